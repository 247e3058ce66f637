"""Full fine-tuning survives what LoRA survives: stopped, killed anywhere, damaged; resumed to the bit.

Its checkpoints are whole models; the table of faults is that of test_operations.py, test_resume.py, test_processes.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hurt import FULL, NUM_STEPS, assert_same, events, orphans, words
from layer import Killed, Layer, faults
from small import small_model

from truetune import checkpoint, disk
from truetune.cli import run
from truetune.rundir import RunDir

pytestmark = pytest.mark.slow

SAMPLE = 37
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LC_ALL": "C.UTF-8"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some thousand weights: a checkpoint of all of them is written in no time."""
    return small_model(tmp_path_factory.mktemp("models") / "small", "qwen3")


@pytest.fixture(scope="module")
def full(data: Path, held_out: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to, and the operations on its files."""
    import torch

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("full") / "out"
    layer = Layer(out.parent)
    with faults(layer):
        assert run(words(data, model, out, eval_data=held_out, **FULL)) == 0
    (out.parent / "operations").write_text(str(len(layer.log)))
    assert len(layer.log) > 250
    assert RunDir(out).result == out / "model"
    assert not (out / "adapter").exists()
    assert [event["step"] for event in events(out) if event["kind"] == "step"] == [*range(1, NUM_STEPS + 1)]
    losses = [event["loss"] for event in events(out) if event["kind"] == "step"]
    assert losses[-1] < losses[0]
    return out


def _hurt_at(number: int, fault: str, *, full: Path, out: Path, command: list[str]) -> int | None:
    """Run with a fault at an operation, then resume; return the first exit code, None if it was killed."""
    try:
        with faults(Layer(out.parent, at=number, fault=fault)):
            code: int | None = run(command)
    except Killed:
        code = None
    if code != 0:
        if (out / "run.json").is_file():
            assert run(["verify", str(out)]) == 0
        assert run([*command, "--resume"] if list(out.glob("*")) or orphans(out) else command) == 0
    assert_same(out, full)
    return code


@pytest.mark.long
def test_killed_or_full_at_some_operations(data: Path, held_out: Path, model: Path, full: Path, tmp_path: Path) -> None:
    """Every SAMPLE-th operation: `make test-faults` takes them all."""
    most = int((full.parent / "operations").read_text())
    codes = []
    for number in range(9, most + 1, SAMPLE):
        for fault in ("kill", "full") if number % 2 else ("kill",):
            out = tmp_path / f"{fault}{number}" / "out"
            command = words(data, model, out, eval_data=held_out, **FULL)
            codes.append(_hurt_at(number, fault, full=full, out=out, command=command))
    assert len(codes) >= 9
    assert set(codes) <= {None, 0, 3}
    assert codes.count(None) >= 6


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["kill", "full", "read-only"])
@pytest.mark.parametrize("part", range(4))
def test_killed_full_or_read_only_at_every_operation(
    part: int, fault: str, data: Path, held_out: Path, model: Path, full: Path, tmp_path: Path
) -> None:
    numbers = range(1 + part, int((full.parent / "operations").read_text()) + 1, 4)
    for number in numbers:
        out = tmp_path / str(number) / "out"
        command = words(data, model, out, eval_data=held_out, **FULL)
        _hurt_at(number, fault, full=full, out=out, command=command)
        shutil.rmtree(out.parent)
    assert len(numbers) > 60


def test_damage_of_every_file(data: Path, held_out: Path, model: Path, full: Path, tmp_path: Path) -> None:
    """Each is named, and the checkpoint before is taken instead."""
    out = tmp_path / "out"
    names = sorted(path.name for path in (full / "checkpoints" / "checkpoint-000006").iterdir())
    assert {"model.safetensors", "optimizer.safetensors", "config.json", "generation_config.json"} <= set(names)
    assert len(names) >= 10
    for name in names:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(full, out)
        path = out / "checkpoints" / "checkpoint-000006" / name
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
        found, skipped = checkpoint.find(out / "checkpoints")
        assert found is not None
        assert (checkpoint.step_of(found), skipped) == (3, {"checkpoint-000006": name})
    RunDir(out).write_info(state="running")
    assert run(words(data, model, out, "--resume", eval_data=held_out, **FULL)) == 0
    assert_same(out, full)


def test_a_process_that_is_killed(data: Path, held_out: Path, model: Path, full: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of the steps, and what is left goes on to the same bits."""
    out = tmp_path / "out"
    command = words(data, model, out, eval_data=held_out, **FULL)
    environment = {**os.environ, **ENVIRONMENT, "TRUETUNE_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen([sys.executable, "-m", "truetune", *command], env=environment)
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None and not (out / "steps.jsonl").exists():
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert disk.damage(out / "data") is None
    assert run(["verify", str(out)]) == 0
    assert run([*command, "--resume"]) == 0
    assert_same(out, full)
    assert run(["verify", str(out), "--resume-exact", "3"]) == 0


def test_lora_does_not_go_on_with_it(data: Path, held_out: Path, model: Path, full: Path, tmp_path: Path) -> None:
    """Nor the other way round, not even where changes are allowed: the tensors are others."""
    out = tmp_path / "out"
    shutil.copytree(full, out)
    RunDir(out).write_info(state="running")
    assert run(words(data, model, out, "--resume", "--allow-changed", eval_data=held_out, learning_rate=1e-3)) == 2
    assert_same(out, full) if RunDir(out).read_info()["state"] == "done" else None
    assert run(words(data, model, out, "--resume", eval_data=held_out, **FULL)) == 0
    assert_same(out, full)
