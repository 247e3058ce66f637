"""Rows a second of DPO: Truetune beside TRL's DPOTrainer, the same rows in the same order and batches, taking turns.

    python -m bench.preferences             the Qwen3-0.6B shape, two steps each, the first to warm up: some minutes
    python -m bench.preferences --steps 4   more of them

A row is one of huanhuan's with another row's answer as the rejected one: what the answers say does not change the time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.envs import python_of
from bench.model import machine_dtype, model_folder, on_the_cpu
from bench.recipe import CACHE, DATA, RESULTS, ROOT, SYSTEM, WARM_UP_STEPS, Job
from bench.report import describe_machine

SEED, ROWS_PER_STEP = 42, 16
CONTENDERS = {"truetune_dpo": None, "trl_dpo": "hf"}


def preference_rows(num_rows: int) -> list[dict[str, Any]]:
    """Return the first rows as preferences."""
    rows = json.loads(DATA.read_text(encoding="utf-8"))
    return [
        {
            "system": SYSTEM,
            "prompt": rows[number]["instruction"] + rows[number]["input"],
            "chosen": rows[number]["output"],
            "rejected": rows[-1 - number]["output"],
        }
        for number in range(num_rows)
    ]


def measure(name: str, job: Job) -> list[dict[str, Any]]:
    """Run one contender in a process of its own and return its measured steps."""
    folder = Path(job.folder) / name
    folder.mkdir(parents=True)
    job = replace(job, contender=name, folder=str(folder), steps_file=str(folder / "steps.jsonl"))
    job.save(folder / "job.json")
    env = CONTENDERS[name]
    python = sys.executable if env is None else str(python_of(env))
    words = [python, "-m", f"bench.contenders.{name}", str(folder / "job.json")]
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TQDM_DISABLE": "1"}
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        code = subprocess.run(
            words, cwd=ROOT, env=on_the_cpu() | own, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        sys.exit(f"{name}: exit code {code}, see {folder / 'log.txt'}")
    lines = Path(job.steps_file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][WARM_UP_STEPS:]


def table(results: dict[str, list[dict[str, Any]]], *, shape: str, dtype: str, is_checkpointed: bool) -> str:
    """Return the results as Markdown."""
    machine = describe_machine()
    rates = {name: [ROWS_PER_STEP / step["seconds"] for step in steps] for name, steps in results.items()}
    lines = [
        "# DPO",
        "",
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores. Qwen3-{shape} shape, {dtype}, "
        f"{ROWS_PER_STEP} rows a step, LoRA r 8 on the seven projections; TRL "
        f"{'with' if is_checkpointed else 'without'} gradient checkpointing.",
        "",
        "| contender | rows/s | peak memory | steps |",
        "|---|---|---|---|",
    ]
    for name, found in rates.items():
        peak = max(step["peak_bytes"] for step in results[name])
        lines.append(f"| {name} | {statistics.median(found):.2f} | {peak / 1e9:.1f} GB | {len(found)} |")
    if len(rates) == 2:
        ours, theirs = (statistics.median(rates[name]) for name in CONTENDERS)
        lines += ["", f"Truetune is {ours / theirs:.1f} times as fast."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure both, print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m bench.preferences")
    parser.add_argument("--shape", default="0.6b", choices=["0.6b", "tiny"])
    parser.add_argument("--steps", type=int, default=WARM_UP_STEPS + 1, help="of each, the first to warm up")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--checkpointing", action="store_true", help="of TRL (its default, which takes less memory)")
    options = parser.parse_args()
    folder = CACHE / "work" / f"dpo-{os.getpid()}"
    folder.mkdir(parents=True)
    rows_file = folder / "rows.json"
    rows_file.write_text(json.dumps(preference_rows(options.steps * ROWS_PER_STEP), ensure_ascii=False))
    dtype, model = machine_dtype(), model_folder(options.shape)
    job = Job(
        *("", options.shape, str(model), str(rows_file), "", str(folder)),
        *(SEED, options.steps, ROWS_PER_STEP, dtype, options.checkpointing),
    )
    results = {name: measure(name, job) for name in options.contenders.split(",")}
    text = table(results, shape=options.shape, dtype=dtype, is_checkpointed=options.checkpointing)
    sys.stdout.write(text)
    if options.shape == "0.6b" and len(results) == 2:
        (RESULTS / "preferences.md").write_text(text, encoding="utf-8")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
