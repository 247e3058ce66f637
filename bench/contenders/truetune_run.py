"""Truetune by its command line, then the matrix products of its steps alone, timed in the same process."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from bench import matmuls
from bench.recipe import DATA, LEARNING_RATE, LORA, MAX_LENGTH, SHAPES, SYSTEM, WARM_UP_STEPS, Job, peak_bytes
from truetune.cli import run


def train_words(job: Job, data: Path, *, output: Path, **more: Any) -> list[str]:
    """Return the command line of a contender's run: the recipe's numbers, and `more` keys; none is held out."""
    options = {
        "model": job.model,
        "output-dir": output,
        "chat-template-kwargs": "{enable_thinking: false}",
        "max-length": MAX_LENGTH,
        "lora-r": LORA["r"],
        "lora-alpha": LORA["lora_alpha"],
        "lora-dropout": LORA["lora_dropout"],
        "target-modules": ",".join(LORA["target_modules"]),
        "dtype": job.dtype,
        "batch-size": job.rows_per_step,
        "max-steps": job.num_steps,
        "learning-rate": LEARNING_RATE,
        "lr-scheduler-type": "linear",
        "warmup-ratio": 0,
        "eval-split": 0,
        "seed": job.seed,
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    return ["train", str(data), *(str(word) for name, value in options.items() for word in (f"--{name}", value))]


def words(job: Job, output: Path) -> list[str]:
    """Return the command line: the same recipe, the whole file, the same order by the same seed."""
    return train_words(job, DATA, output=output, system=SYSTEM, input_join="")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_order(job: Job, steps: list[dict[str, Any]]) -> None:
    """Leave with an error if truetune took other rows than the contenders were given."""
    taken = [number for step in steps for number in step["rows"]]
    if taken != [row["id"] for row in job.rows()]:
        sys.exit("truetune took other rows than the other contenders were given")


def main(job: Job) -> None:
    """Take the job's steps."""
    output = Path(job.folder) / "run"
    code = run(words(job, output))
    if code:
        sys.exit(code)
    peak = peak_bytes()
    gc.collect()
    check_order(job, read_lines(output / "steps.jsonl"))
    events = [event for event in read_lines(output / "events.jsonl") if event["kind"] == "step"]
    products, rate = matmuls.Products(SHAPES[job.shape], job.dtype), matmuls.peak_rate(job.dtype)
    for number, event in enumerate(events):
        more: dict[str, Any] = {"peak_bytes": peak}
        if number >= WARM_UP_STEPS:
            more["matmul_seconds"] = products.seconds(matmuls.Work.of_event(event, output))
            more["useful_operations"] = matmuls.useful_operations(SHAPES[job.shape], event)
            more["peak_rate"] = rate
        job.record(event["step"], event["seconds"], **more)


if __name__ == "__main__":
    main(Job.from_command_line())
