"""Streamed rows beside rows that are prepared first: time to the first step, rows a second, memory.

    python -m bench.streaming                    10,000, 100,000 and 1,000,000 rows of huanhuan's size; ten minutes
    python -m bench.streaming --rows 10000       one size

The same rows as bench.data. Every row is handed over once, in steps of 16, without a model: what is timed is what comes
before the model. Memory is the process's own, without mapped pages of files; imports and the tokenizer are in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.data import SIZES, write_rows
from bench.recipe import RESULTS, ROOT, TOKENIZER
from bench.report import describe_machine

WAYS = ("prepared", "streamed")


def measure(path: Path, how: str, cache: Path) -> dict[str, Any]:
    """Return what one way took in a process of its own."""
    words = [sys.executable, "-m", "bench.contenders.streaming", str(path), str(TOKENIZER), how]
    environment = os.environ | {"TRUETUNE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(results: dict[tuple[str, int], dict[str, Any]], sizes: list[int]) -> str:
    """Return the results as Markdown."""
    machine = describe_machine()
    lines = [
        "# Streaming",
        "",
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores. Alpaca rows of huanhuan's size, Qwen3's "
        "tokenizer and template, steps of 16 rows, shuffle_rows 10,000, no model. Memory: the process's own, without "
        "mapped pages of files.",
        "",
        "| | rows | seconds to the first step | rows/s, all handed over | memory |",
        "|---|---|---|---|---|",
    ]
    for how in WAYS:
        for size in sizes:
            found = results[how, size]
            cells = (f"{size:,}", f"{found['first_s']:.1f}", f"{found['rows'] / found['seconds']:,.0f}")
            lines.append(f"| {how} | {' | '.join(cells)} | {found['own_bytes'] / 1e9:.2f} GB |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all, print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m bench.streaming")
    parser.add_argument("--rows", type=int, action="append", help="a size (more than once: several)")
    sizes = parser.parse_args().rows or list(SIZES)
    results: dict[tuple[str, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            path = Path(folder) / f"{size}.json"
            write_rows(path, size)
            for how in WAYS:
                results[how, size] = measure(path, how, Path(folder) / f"{size}-{how}")
                sys.stderr.write(f"{how}, {size} rows: {results[how, size]}\n")
    text = table(results, sizes)
    sys.stdout.write(text)
    if sizes == list(SIZES):
        (RESULTS / "streaming.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
