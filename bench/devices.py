"""One process with all cores against two with half of them each: rows a second, and the memory of each.

    python -m bench.devices             the Qwen3-0.6B shape on this machine: about three minutes
    python -m bench.devices --shape tiny

The same steps each time: 16 rows of 128 random tokens, half of them a common prefix. Two processes run under torchrun,
once with a base each (`replicate`), once with its layers spread over both (`shard`). Memory is the most that a process
holds during its steps, looked at every 50 ms: alone on its machine (RSS), and its part where they share one (PSS). On a
CPU, weights in the type in which they are stored are mapped from their file, so that processes of one machine share
them: in `replicate`, half of the base counts for each then.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.recipe import RESULTS, ROOT, SHAPES
from bench.report import describe_machine

CELL = ("medium", 0.5, 16)
NUM_STEPS = 5
CASES = {"one process": (1, "replicate"), "replicate": (2, "replicate"), "shard": (2, "shard")}


def work(shape: str, strategy: str, target: Path) -> None:
    """Take steps in this rank; rank 0 writes seconds, and the most memory of any rank."""
    import torch

    from bench.scaling import load_engine, random_pairs
    from truetune.engine.shard import make_mesh, shard
    from truetune.loop import Loop, Plan
    from truetune.ranks import connected
    from truetune.records import Row

    with connected() as ranks:
        mesh = make_mesh(ranks.size) if strategy == "shard" else None
        with ranks.in_turn():
            engine, optimizer = load_engine(shape)
            if mesh is not None:
                shard(engine.model, mesh)
                engine = type(engine)(**vars(engine) | {"is_sharded": True})
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        plan = Plan(NUM_STEPS + 1, CELL[2], 42, 1.0, 1000, 1000)
        loop = Loop(engine, optimizer, scheduler, plan, lambda loss: loss.backward(), ranks=ranks)
        pairs = [
            pair
            for step in range(NUM_STEPS + 1)
            for pair in random_pairs(CELL, seed=step, vocab_size=SHAPES[shape].vocab_size)
        ]
        rows = [Row(number, f"row {number}", (pair,)) for number, pair in enumerate(pairs)]
        with most_held() as peaks:
            events = list(loop.run(rows))
        seconds = [event["seconds"] for event in events[1:]]
        most = {name: ranks.most(max(held)) for name, held in peaks.items()}
        told = {"seconds": seconds, **most, "threads": torch.get_num_threads()}
        if ranks.is_main:
            target.write_text(json.dumps(told), encoding="utf-8")
    os._exit(0)


@contextmanager
def most_held() -> Iterator[dict[str, list[int]]]:
    """Give lists that fill with the bytes that this process holds, while the block runs."""
    import psutil

    peaks: dict[str, list[int]] = {"rss": [0], "pss": [0]}
    is_over, process = threading.Event(), psutil.Process()

    def watch() -> None:
        while not is_over.wait(0.05):
            held = process.memory_full_info()
            for name, values in peaks.items():
                values.append(getattr(held, name))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        is_over.set()
        watcher.join()


def measure(name: str, shape: str) -> dict[str, Any]:
    """Run one case in processes of its own and return what its ranks found."""
    num_ranks, strategy = CASES[name]
    target = RESULTS / f".devices-{name.replace(' ', '-')}.json"
    module = ["-m", "bench.devices", "--shape", shape, "--work", strategy, "--target", str(target)]
    by = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"] if num_ranks > 1 else []
    # Cores are shared by the processes; torchrun by itself would give each of them one.
    threads = str(max(len(os.sched_getaffinity(0)) // num_ranks, 1))
    began = time.perf_counter()
    subprocess.run([sys.executable, *by, *module], cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": threads})
    found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    target.unlink()
    sys.stderr.write(f"{name}: {time.perf_counter() - began:.0f} s in all, {found}\n")
    return found


def main() -> None:
    """Measure every case, print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m bench.devices")
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--work", help="take the steps as a rank: replicate or shard")
    parser.add_argument("--target", type=Path)
    options = parser.parse_args()
    if options.work:
        work(options.shape, options.work, options.target)
        return
    machine = describe_machine()
    lines = [
        f"# Two processes against one, Qwen3-{options.shape.upper()} shape",
        "",
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, load before {machine['load_before']}. "
        f"Median of {NUM_STEPS} steps of {CELL[2]} rows.",
        "",
        "| | processes × threads | rows/s | memory of each, alone | sharing a machine |",
        "|---|---|---|---|---|",
    ]
    for name, (num_ranks, _) in CASES.items():
        found = measure(name, options.shape)
        rate = CELL[2] / statistics.median(found["seconds"])
        memory = " | ".join(f"{found[key] / 1e9:.2f} GB" for key in ("rss", "pss"))
        lines.append(f"| {name} | {num_ranks} × {found['threads']} | {rate:.2f} | {memory} |")
    table = "\n".join([*lines, ""])
    (RESULTS / f"devices-{options.shape}.md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)


if __name__ == "__main__":
    main()
