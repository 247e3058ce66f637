"""Peak memory and time of one long pair against its length, the governor choosing what is recomputed.

    python -m bench.lengths             1,024 to 16,384 tokens at the Qwen3-0.6B shape: about ten minutes

Each length runs in a process of its own: prompt of 64 random tokens, the rest learned; one step after the governor.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np

from bench.recipe import RESULTS, ROOT, SHAPES, peak_bytes
from bench.report import describe_machine

LENGTHS = (1024, 2048, 4096, 8192, 16384)
PROMPT_TOKENS = 64


def measure(shape: str, length: int) -> dict[str, float]:
    """Return what one step of one pair took."""
    from bench.scaling import load_engine
    from truetune.engine.memory import choose_limits
    from truetune.engine.objective import train_step
    from truetune.engine.step import make_forwards
    from truetune.records import Pair, Row

    engine, optimizer = load_engine(shape)
    ids = np.random.default_rng(length).integers(SHAPES[shape].vocab_size, size=length).tolist()
    pair = Pair(tuple(ids[:PROMPT_TOKENS]), tuple(ids[PROMPT_TOKENS:]))
    engine, limits = choose_limits(engine, [Row(0, "row 1", (pair,))])
    began = time.perf_counter()
    train_step(engine, make_forwards(engine, [pair]), seeds=(0, 1), backward=lambda loss: loss.backward())
    optimizer.step()
    return {
        "tokens": length,
        "seconds": time.perf_counter() - began,
        "peak_bytes": peak_bytes(),
        "predicted_bytes": limits.peak_bytes,
        "is_checkpointed": limits.is_checkpointed,
    }


def main() -> None:
    """Measure every length, print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m bench.lengths")
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--one", type=int, help="measure one length and print it as JSON")
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(measure(options.shape, options.one)) + "\n")
        return
    results = []
    for length in LENGTHS:
        words = [sys.executable, "-m", "bench.lengths", "--shape", options.shape, "--one", str(length)]
        found = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
        results.append(json.loads(found.splitlines()[-1]))
        sys.stderr.write(found)
    machine = describe_machine()
    lines = [
        f"# One pair of many tokens, Qwen3-{options.shape.upper()} shape",
        "",
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores. One step: forward, backward, update.",
        "",
        "| tokens | peak memory | predicted | activations | seconds |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        kind = "recomputed" if result["is_checkpointed"] else "kept"
        lines.append(
            f"| {result['tokens']:,} | {result['peak_bytes'] / 1e9:.1f} GB | {result['predicted_bytes'] / 1e9:.1f} GB "
            f"| {kind} | {result['seconds']:.1f} |"
        )
    table = "\n".join([*lines, ""])
    (RESULTS / f"lengths-{options.shape}.md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)


if __name__ == "__main__":
    main()
