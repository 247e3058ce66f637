"""Truetune's DPO by its command line, in the order of the other contender's rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from bench.contenders.truetune_run import read_lines, train_words
from bench.recipe import Job, peak_bytes
from truetune.cli import run
from truetune.engine.order import epoch_batches


def main(job: Job) -> None:
    """Take the job's steps."""
    rows, output = job.rows(), Path(job.folder) / "run"
    order = np.concatenate(epoch_batches(len(rows), job.rows_per_step, seed=job.seed, epoch=0))
    shuffled = [rows[place] for place in np.argsort(order)]
    data = Path(job.folder) / "rows.json"
    data.write_text(json.dumps(shuffled, ensure_ascii=False), encoding="utf-8")
    # TRL's DPO switches dropout off.
    if code := run(train_words(job, data, output=output, loss="dpo", lora_dropout=0, sample_prompts="none")):
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
