"""Rows a second and peak memory of preparing data: reading, rendering by the real template, tokens.

    python -m bench.data                    10,000, 100,000 and 1,000,000 rows of huanhuan's size; about ten minutes
    python -m bench.data --rows 10000       one size

Rows are those of huanhuan.json over and over, each with its number in the instruction, so that no two are equal. Every
size and contender has a process of its own; imports are not counted. The peers get the sizes that they do in minutes.
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

from bench.envs import EnvError, python_of
from bench.recipe import DATA, RESULTS, ROOT, SYSTEM, TOKENIZER
from bench.report import describe_machine

SIZES = (10_000, 100_000, 1_000_000)
MAX_PEER_ROWS = 100_000
CONTENDERS = {
    "data_notebook": ("notebook recipe (Dataset.map)", "hf"),
    "data_trl": ("TRL 1.16.0 SFTTrainer", "hf"),
    "data_truetune": ("truetune", None),
    "data_again": ("truetune, the second time", None),
}


def write_rows(path: Path, num_rows: int) -> None:
    """Write the rows as a JSON array, one row a line."""
    rows = json.loads(DATA.read_text(encoding="utf-8"))
    with path.open("w", encoding="utf-8") as stream:
        for number in range(num_rows):
            row = rows[number % len(rows)]
            row = row | {"instruction": f"{row['instruction']} {number}", "system": SYSTEM}
            stream.write(("[" if number == 0 else ",\n") + json.dumps(row, ensure_ascii=False))
        stream.write("]\n")


def measure(contender: str, path: Path, cache: Path) -> dict[str, Any]:
    """Return {"seconds", "peak_bytes"} of one contender in its own process, or {"problem"}."""
    _, env = CONTENDERS[contender]
    try:
        python = sys.executable if env is None else str(python_of(env))
    except EnvError as error:
        return {"problem": str(error)}
    module = "data_truetune" if env is None else contender
    words = [python, "-m", f"bench.contenders.{module}", str(path), str(TOKENIZER)]
    quiet = {"HF_DATASETS_CACHE": str(cache / "datasets"), "TRUETUNE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=ROOT, env=os.environ | quiet, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"problem": (done.stderr.strip().splitlines() or ["failed"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(results: dict[tuple[str, int], dict[str, Any]], sizes: list[int]) -> str:
    """Return the results as Markdown."""
    machine = describe_machine()
    lines = [
        "# Preparing data",
        "",
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores. Alpaca rows of huanhuan's size, Qwen3's "
        "tokenizer and template; rows/s and peak memory, imports not counted.",
        "",
        "| contender | " + " | ".join(f"{size:,} rows" for size in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for name, (title, _) in CONTENDERS.items():
        cells = []
        for size in sizes:
            found = results.get((name, size))
            if found is None:
                cells.append("not run")
            elif "problem" in found:
                cells.append(f"missing: {found['problem'][:60]}")
            else:
                cells.append(f"{size / found['seconds']:,.0f}/s, {found['peak_bytes'] / 1e9:.2f} GB")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all, print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m bench.data")
    parser.add_argument("--rows", type=int, action="append", help="a size (more than once: several)")
    sizes = parser.parse_args().rows or list(SIZES)
    results: dict[tuple[str, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            path = Path(folder) / f"{size}.json"
            write_rows(path, size)
            for name in CONTENDERS:
                if CONTENDERS[name][1] is None or size <= MAX_PEER_ROWS:
                    results[name, size] = measure(name, path, Path(folder) / str(size))
                    sys.stderr.write(f"{name}, {size} rows: {results[name, size]}\n")
    text = table(results, sizes)
    sys.stdout.write(text)
    if sizes == list(SIZES):
        (RESULTS / "data.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
