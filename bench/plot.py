"""Results → a picture beside them: rows a second and peak memory. Runs where matplotlib is (requirements-hf.txt).

python -m bench.plot bench/results/0.6b.json
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

from bench.report import OURS, rates

matplotlib.use("Agg")
from matplotlib import pyplot

OURS_COLOUR, OTHER_COLOUR = "#1f6f8b", "#b8c4cc"


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture: a bar for the median, a dot for each measured step; a missing contender is named."""
    contenders = result["contenders"][::-1]
    titles = [contender["title"].replace(", ", ",\n").replace(" (", "\n(") for contender in contenders]
    colours = [OURS_COLOUR if contender["name"] == OURS else OTHER_COLOUR for contender in contenders]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 1.6 + 0.6 * len(contenders)), sharey=True)
    medians = [statistics.median(rates(contender) or [0]) for contender in contenders]
    peaks = [max((step["peak_bytes"] for step in contender["steps"]), default=0) / 1e9 for contender in contenders]
    left.barh(titles, medians, color=colours)
    right.barh(titles, peaks, color=colours)
    for place, contender in enumerate(contenders):
        is_measured = bool(contender["steps"])
        left.plot(rates(contender), [place] * len(contender["steps"]), ".", color="#333333", markersize=4)
        name = f" {medians[place]:.2f}" if is_measured else " missing"
        left.annotate(name, (medians[place], place), va="bottom", fontsize=9)
        right.annotate(f" {peaks[place]:.1f}" if is_measured else "", (peaks[place], place), va="center", fontsize=9)
    left.set_xlabel("rows a second (more is better)")
    right.set_xlabel("peak memory, GB (less is better)")
    for axes in (left, right):
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Qwen3-{result['shape'].upper()} shape, {result['rows_per_step']} rows a step, {result['dtype']}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text(encoding="utf-8")), source.with_suffix(".png"))
