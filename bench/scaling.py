"""Rows a second of truetune's engine against rows of a step, tokens of a row and the share of a common prefix.

    python -m bench.scaling             the Qwen3-0.6B shape: about 20 minutes
    python -m bench.scaling --quick     one step a cell, the two smallest steps only

Rows are random tokens: a prefix that all rows of a step share, then tokens of their own, half of them learned.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.model import model_folder
from bench.recipe import LEARNING_RATE, LORA, RESULTS, SHAPES
from bench.report import describe_machine
from truetune.engine.compare import use_kind
from truetune.engine.objective import train_step
from truetune.engine.step import Engine, Forward, make_forwards
from truetune.model import add_lora, choose_dtype, find_base, load_base
from truetune.records import Pair

BATCH_SIZES = (4, 8, 16, 32, 64)
LENGTHS = {"short": 32, "medium": 128, "long": 512}
PREFIXES = (0.0, 0.5, 0.9)
MAX_TOKENS = 2048
"""Of one forward; what the memory governor takes on a CPU with room."""

Cell = tuple[str, float, int]
"""(name of a length, share of the prefix, rows of a step)."""


def random_pairs(cell: Cell, *, seed: int, vocab_size: int) -> list[Pair]:
    """Return the rows of one step."""
    length, share, num_rows = LENGTHS[cell[0]], cell[1], cell[2]
    draws = np.random.default_rng([seed, length, num_rows])
    prefix = draws.integers(vocab_size, size=round(length * share)).tolist()
    num_learned = max((length - len(prefix)) // 2, 1)
    pairs = []
    for _ in range(num_rows):
        ids = [*prefix, *draws.integers(vocab_size, size=length - len(prefix)).tolist()]
        pairs.append(Pair(tuple(ids[:-num_learned]), tuple(ids[-num_learned:])))
    return pairs


def load_engine(shape: str) -> tuple[Engine, torch.optim.Optimizer]:
    """Return truetune's engine with the model of a shape, and its optimizer."""
    model = add_lora(
        load_base(find_base(str(model_folder(shape))), choose_dtype()[0]),
        r=LORA["r"],
        alpha=LORA["lora_alpha"],
        dropout=LORA["lora_dropout"],
        targets=LORA["target_modules"],
        seed=42,
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    return use_kind(Engine(model, "trie", 0, MAX_TOKENS)), optimizer


def take_step(engine: Engine, optimizer: torch.optim.Optimizer, pairs: list[Pair], step: int) -> float:
    """Take one optimizer step on pairs and return its seconds; tries are built outside, as in a run."""
    return timed_step(engine, optimizer, make_forwards(engine, pairs), step)


def timed_step(engine: Engine, optimizer: torch.optim.Optimizer, forwards: list[Forward], step: int) -> float:
    """Take one optimizer step as the loop does, and return its seconds."""
    began = time.perf_counter()
    train_step(engine, forwards, seeds=(42, step), backward=lambda loss: loss.backward())
    torch.nn.utils.clip_grad_norm_([p for p in engine.model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def measure(shape: str, cells: list[Cell], num_steps: int) -> dict[Cell, float]:
    """Return the median rows a second of each cell; steps go round by round, so that a slow minute hits all cells."""
    engine, optimizer = load_engine(shape)
    vocab_size = SHAPES[shape].vocab_size
    seconds: dict[Cell, list[float]] = {cell: [] for cell in cells}
    take_step(engine, optimizer, random_pairs(("medium", 0.0, 8), seed=0, vocab_size=vocab_size), 0)
    for step in range(1, num_steps + 1):
        for cell in cells:
            pairs = random_pairs(cell, seed=step, vocab_size=vocab_size)
            seconds[cell].append(take_step(engine, optimizer, pairs, step))
            sys.stderr.write(f"{step} of {num_steps}: {cell}: {cell[2] / seconds[cell][-1]:.2f} rows/s\n")
    return {cell: cell[2] / statistics.median(times) for cell, times in seconds.items()}


def markdown(shape: str, found: dict[Cell, float], machine: dict[str, Any], num_steps: int) -> str:
    """Return the table: a line for each length and prefix, a column for each number of rows."""
    sizes = sorted({size for _, _, size in found})
    lines = [
        f"# truetune at the Qwen3-{shape.upper()} shape: rows a second",
        "",
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, {choose_dtype()[0]}, medians of "
        f"{num_steps} steps. Rows of random tokens: a prefix that all rows of a step share, half of the rest learned.",
        "",
        "| tokens of a row | common prefix | " + " | ".join(f"{size} rows a step" for size in sizes) + " |",
        "|---|---|" + "---|" * len(sizes),
    ]
    for name, share in sorted({cell[:2] for cell in found}, key=lambda key: (LENGTHS[key[0]], key[1])):
        cells = " | ".join(f"{found[name, share, size]:.2f}" for size in sizes)
        lines.append(f"| {name}, {LENGTHS[name]} | {share:.0%} | {cells} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure every cell and write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--steps", type=int, default=3, help="steps of each cell")
    parser.add_argument("--quick", action="store_true", help="one step a cell, the two smallest steps only")
    options = parser.parse_args()
    num_steps = 1 if options.quick else options.steps
    cells = list(product(LENGTHS, PREFIXES, BATCH_SIZES[:2] if options.quick else BATCH_SIZES))
    machine = describe_machine()
    found = measure(options.shape, cells, num_steps)
    table = markdown(options.shape, found, machine, num_steps)
    write(options.shape, found, table)
    sys.stdout.write(table)


def write(shape: str, found: dict[Cell, float], table: str) -> None:
    """Write table and numbers."""
    RESULTS.mkdir(exist_ok=True)
    path: Path = RESULTS / f"scaling-{shape}.md"
    path.write_text(table, encoding="utf-8")
    numbers = [{"length": a, "prefix": b, "rows": c, "rows_per_second": rate} for (a, b, c), rate in found.items()]
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
