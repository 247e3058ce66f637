"""All are told; neither a tracker that fails nor a full disk ends a run, and each is said once."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from truetune import rundir
from truetune.console import Console
from truetune.messages import text
from truetune.rundir import RunDir
from truetune.teller import Teller
from truetune.trackers import Trackers

STEP = {"kind": "step", "loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0, "rows": 2, "seconds": 1.0, "epoch": 0.1}
STEP |= {"computed_tokens": 5, "memory_bytes": 10, "cpu_percent": 1.0, "gpu_percent": None}


class Accelerator:
    """Trackers that do not answer."""

    def __init__(self) -> None:
        self.asked = 0
        self.trackers = [SimpleNamespace(finish=self.log)]

    def log(self, *_: Any, **__: Any) -> None:
        self.asked += 1
        raise type("ServiceError", (Exception,), {})("no network")


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def _tell(run_dir: RunDir, accelerator: Any, steps: int = 3) -> None:
    console = Console("en")
    with console.progress(steps) as screen:
        teller = Teller(run_dir, Trackers(accelerator, every=1), console, screen, 1)
        for step in range(1, steps + 1):
            teller.tell({**STEP, "step": step, "row_ids": [step]})
        teller.end()


def test_a_tracker_that_fails(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    accelerator = Accelerator()
    _tell(run_dir, accelerator)
    assert accelerator.asked == 4
    assert [event["step"] for event in run_dir.read_events()] == [1, 2, 3]
    assert [line["rows"] for line in run_dir.read_step_rows()] == [[1], [2], [3]]
    said = text("train.tracker_failed", problem="ServiceError: no network")
    assert capsys.readouterr().out.count(said) == 1


def test_a_full_disk(run_dir: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    append, full = rundir._append_bytes, iter([False, False, True, True, True, False, False, False])

    def once_full(path: Path, content: bytes) -> None:
        if next(full):
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, content)

    monkeypatch.setattr(rundir, "_append_bytes", once_full)
    _tell(run_dir, type("Quiet", (), {"log": lambda *_, **__: None, "trackers": ()})(), steps=4)
    assert [event["step"] for event in run_dir.read_events()] == [1, 2, 3, 4]
    assert [line["step"] for line in run_dir.read_step_rows()] == [1, 2, 3, 4]
    assert not run_dir.has_waiting_lines
    assert capsys.readouterr().out.count(text("train.log_waits", path=run_dir.events)) == 1
