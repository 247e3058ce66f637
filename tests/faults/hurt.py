"""A short run with everything that could differ: dropout, shuffling, a smaller last batch, evaluations, a best step."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from truetune.cli import run
from truetune.rundir import RunDir

KEYS = {
    "batch-size": 5,
    "lora-r": 2,
    "lora-dropout": 0.2,
    "learning-rate": 1e-2,
    "num-train-epochs": 2,
    "eval-steps": 2,
    "save-steps": 3,
    "attention": "trie",
    "max-tokens-per-forward": 40,
    "gradient-checkpointing": "false",
    "dtype": "float32",
    "result": "last",
    "sample-prompts": "none",
}
NUM_STEPS = 6
FREE = ("seconds", "memory_bytes", "cpu_percent", "gpu_percent")


def words(data: Path, model: Path, out: Path, *more: str, **keys: Any) -> list[str]:
    """The command of the run; the engine is named, so that it is not compared each time."""
    flags = [str(part) for key, value in {**KEYS, **keys}.items() for part in (f"--{key.replace('_', '-')}", value)]
    return ["train", str(data), "--model", str(model), "--output-dir", str(out), *flags, *more]


def events(out: Path) -> list[dict[str, Any]]:
    """What was told of the steps, without what the clock and the machine decide."""
    told = [event for event in RunDir(out).read_events() if "step" in event]
    return [{key: value for key, value in event.items() if key not in FREE} for event in told]


def digest(out: Path) -> str:
    """The sha256 of the adapter."""
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def assert_same(out: Path, whole: Path) -> None:
    """A run that was hurt and resumed is, byte for byte, the one that was not; and nothing is left lying about."""
    assert run(["verify", str(out)]) == 0
    assert events(out) == events(whole)
    assert (out / "steps.jsonl").read_bytes() == (whole / "steps.jsonl").read_bytes()
    assert digest(out) == digest(whole)
    last = f"checkpoints/checkpoint-{NUM_STEPS:06d}/optimizer.safetensors"
    assert (out / last).read_bytes() == (whole / last).read_bytes()
    assert orphans(out) == []


def orphans(out: Path) -> list[str]:
    """Files that no run leaves."""
    return sorted(str(path.relative_to(out)) for path in out.rglob(".*"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen rows, in steps of 5, 5 and 3."""
    path = tmp_path_factory.mktemp("data") / "numbers.json"
    rows = [{"instruction": f"What is {n} plus {n}?", "output": f"It is {2 * n}."} for n in range(13)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows to evaluate."""
    path = tmp_path_factory.mktemp("data") / "held-out.json"
    rows = [{"instruction": f"What is {n} minus 1?", "output": f"It is {n - 1}."} for n in range(4)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def whole(data: Path, held_out: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    import torch

    torch.set_num_threads(1)  # as in the tests; sums of other threads round otherwise
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(words(data, tiny_base, out, eval_data=held_out)) == 0
    assert [event["step"] for event in events(out) if event["kind"] == "step"] == [*range(1, NUM_STEPS + 1)]
    assert [event["step"] for event in events(out) if event["kind"] == "eval"] == [0, 2, 4, 6]
    return out
