"""Truetune's DPO by its command line, in the order of the other contender's rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from bench.contenders.truetune_run import read_lines
from bench.recipe import LEARNING_RATE, LORA, MAX_LENGTH, Job, peak_bytes
from truetune.cli import run
from truetune.engine.order import epoch_batches


def words(job: Job, data: Path, output: Path) -> list[str]:
    """Return the command line: the same recipe."""
    options = {
        "model": job.model,
        "output-dir": output,
        "loss": "dpo",
        "chat-template-kwargs": "{enable_thinking: false}",
        "max-length": MAX_LENGTH,
        "lora-r": LORA["r"],
        "lora-alpha": LORA["lora_alpha"],
        # TRL's DPO switches dropout off.
        "lora-dropout": 0,
        "target-modules": ",".join(LORA["target_modules"]),
        "dtype": job.dtype,
        "batch-size": job.rows_per_step,
        "max-steps": job.num_steps,
        "learning-rate": LEARNING_RATE,
        "lr-scheduler-type": "linear",
        "warmup-ratio": 0,
        "eval-split": 0,
        "sample-prompts": "none",
        "seed": job.seed,
    }
    return ["train", str(data), *(str(word) for name, value in options.items() for word in (f"--{name}", value))]


def main(job: Job) -> None:
    """Take the job's steps."""
    rows, output = job.rows(), Path(job.folder) / "run"
    order = np.concatenate(epoch_batches(len(rows), job.rows_per_step, seed=job.seed, epoch=0))
    shuffled = [rows[place] for place in np.argsort(order)]
    data = Path(job.folder) / "rows.json"
    data.write_text(json.dumps(shuffled, ensure_ascii=False), encoding="utf-8")
    if code := run(words(job, data, output)):
        sys.exit(code)
    taken = [shuffled[number] for line in read_lines(output / "steps.jsonl") for number in line["rows"]]
    if taken != rows:
        sys.exit("truetune took other rows than the other contender was given")
    for event in read_lines(output / "events.jsonl"):
        if event["kind"] == "step":
            told = {name: event[name] for name in ("loss", "computed_tokens", "trie_tokens", "learned_tokens")}
            job.record(event["step"], event["seconds"], peak_bytes=peak_bytes(), **told)


if __name__ == "__main__":
    main(Job.from_command_line())
