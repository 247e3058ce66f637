"""Memory and rows a second of bases in bf16, 8 and 4 bits, and of LoRA's kinds on bf16, at the Qwen3-0.6B shape.

    python -m bench.quantised             5 bases and kinds, one round of two steps: about 3 minutes
    python -m bench.quantised --rounds 3

Each is a process of its own, round by round, so that a slow minute hits all of them. Ratios are to plain LoRA on bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from bench.model import model_folder
from bench.recipe import LEARNING_RATE, LORA, RESULTS, ROOT, SHAPES
from bench.report import describe_machine

CASES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "bf16": (None, {}),
    "8bit": ("8bit", {}),
    "4bit": ("4bit", {}),
    "bf16, DoRA": (None, {"use_dora": True}),
    "bf16, PiSSA": (None, {"init_lora_weights": "pissa_niter_16"}),
}
"""Name → quantization, and what LoRA is told."""

CELL = ("medium", 0.5, 16)
"""Rows of 128 tokens, half of them common to all 16 rows of a step."""

MAX_TOKENS = 2048


def measure(name: str, *, shape: str, num_steps: int) -> dict[str, float]:
    """Return what one case takes, in this process: bytes of weights, peak bytes, seconds to load and of a step."""
    import torch

    from bench.scaling import random_pairs, take_step
    from truetune.engine.compare import use_kind
    from truetune.engine.memory import peak_of
    from truetune.engine.quantised import held_bytes
    from truetune.engine.step import Engine
    from truetune.model import add_lora, find_base, load_base

    quantization, kind = CASES[name]
    base = find_base(str(model_folder(shape)), quantization=quantization)
    with peak_of(torch.device("cpu")) as peak:
        began = time.perf_counter()
        model = load_base(base, "bfloat16")
        held = held_bytes(model)
        dropout = 0.0 if "init_lora_weights" in kind else LORA["lora_dropout"]
        lora = {"r": LORA["r"], "alpha": LORA["lora_alpha"], "dropout": dropout}
        model = add_lora(model, **lora, targets=LORA["target_modules"], seed=42, **kind).train()
        loaded = time.perf_counter() - began
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    engine = use_kind(Engine(model, "trie", 0, MAX_TOKENS))
    vocab_size = SHAPES[shape].vocab_size
    with peak_of(torch.device("cpu")) as step_peak:
        seconds = [
            take_step(engine, optimizer, random_pairs(CELL, seed=step, vocab_size=vocab_size), step)
            for step in range(num_steps + 1)
        ]
    return {
        "weights": held,
        "load_peak": peak(),
        "step_peak": step_peak(),
        "load_seconds": loaded,
        "rows_per_s": CELL[2] / statistics.median(seconds[1:]),
    }


def _asked(name: str, *, shape: str, num_steps: int) -> dict[str, float]:
    """Measure a case in a process of its own."""
    words = [sys.executable, "-m", "bench.quantised", "--shape", shape, "--steps", str(num_steps), "--case", name]
    done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def markdown(shape: str, found: dict[str, dict[str, float]], machine: dict[str, Any]) -> str:
    """Return the table."""
    plain = found["bf16"]
    lines = [
        f"# Bases in 4 and 8 bits, and kinds of LoRA, at the Qwen3-{shape.upper()} shape",
        "",
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores. Rows of 128 random tokens, half of them "
        "common, 16 rows a step, LoRA r 8 on all seven projections; medians.",
        "",
        "| base | weights, GB | peak of loading, GB | peak of a step, GB | seconds to load | rows/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in found.items():
        cells = [
            f"{case[key] / scale:.2f} ({case[key] / plain[key]:.2f}×)"
            for key, scale in (("weights", 1e9), ("load_peak", 1e9), ("step_peak", 1e9))
        ]
        rate = f"{case['rows_per_s']:.2f} ({case['rows_per_s'] / plain['rows_per_s']:.2f}×)"
        lines.append(f"| {name} | {' | '.join(cells)} | {case['load_seconds']:.1f} | {rate} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure every case and write the table; with --case, one of them, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.6b", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--case", choices=list(CASES))
    values = parser.parse_args()
    if values.case:
        sys.stdout.write(json.dumps(measure(values.case, shape=values.shape, num_steps=values.steps)) + "\n")
        return
    num_rounds, num_steps = values.rounds, values.steps
    model_folder(values.shape)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    for number in range(num_rounds):
        for name in CASES:
            rounds[name].append(_asked(name, shape=values.shape, num_steps=num_steps))
            sys.stderr.write(f"{number + 1} of {num_rounds}: {name}: {rounds[name][-1]['rows_per_s']:.2f} rows/s\n")
    found = {
        name: {key: statistics.median(case[key] for case in cases) for key in cases[0]}
        for name, cases in rounds.items()
    }
    text = markdown(values.shape, found, describe_machine())
    sys.stdout.write(text)
    (RESULTS / f"quantised-{values.shape}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
