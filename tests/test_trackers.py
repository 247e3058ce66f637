"""Trackers through accelerate: what they are told, TensorBoard and SwanLab for real."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from truetune import trackers
from truetune.config import Config, resolve
from truetune.errors import UserError
from truetune.trackers import Trackers

STEP: dict[str, Any] = {
    "kind": "step",
    "step": 3,
    "epoch": 0.25,
    "loss": 1.5,
    "learning_rate": 1e-4,
    "grad_norm": 0.5,
    "rows": 8,
    "pairs": 9,
    "learned_tokens": 100,
    "trie_tokens": 300,
    "computed_tokens": 400,
    "seconds": 2.0,
    "memory_bytes": 2**30,
    "cpu_percent": 150.5,
    "gpu_percent": None,
}
EVAL = {"kind": "eval", "step": 3, "eval_loss": 1.25, "seconds": 1.0}
SCALARS = {
    "train/loss": 1.5,
    "train/learning_rate": 1e-4,
    "train/grad_norm": 0.5,
    "train/memory_bytes": 2**30,
    "train/cpu_percent": 150.5,
    "train/epoch": 0.25,
    "train/rows_per_second": 4.0,
    "train/tokens_per_second": 200.0,
}


class Accelerator:
    """Remembers the calls that trackers would get."""

    def __init__(self) -> None:
        self.started: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.logged: list[tuple[dict[str, float], int]] = []

    def init_trackers(self, *args: Any, **kwargs: Any) -> None:
        self.started.append((args, kwargs))

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))

    @property
    def trackers(self) -> list[Any]:
        return [self]

    def finish(self) -> None:
        self.logged.append(({}, -1))


# --- installed or not ---


def test_trackers_that_are_installed_pass() -> None:
    trackers.check_installed([])
    trackers.check_installed(["tensorboard", "swanlab"])


@pytest.mark.parametrize("name", ["swanlab", "tensorboard"])
def test_a_missing_tracker_is_answered_with_the_command_to_install_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else object())
    with pytest.raises(UserError) as caught:
        trackers.check_installed(["tensorboard", "swanlab"])
    assert (caught.value.key, caught.value.where) == ("extra_missing", f"report_to: {name}")
    assert f'pip install "truetune[{name}]"' in str(caught.value)


# --- what they are told ---


def test_scalars_of_a_step() -> None:
    assert trackers.scalars_of(STEP) == SCALARS


def test_scalars_of_a_step_on_a_gpu() -> None:
    assert trackers.scalars_of(STEP | {"gpu_percent": 97.0}) == SCALARS | {"train/gpu_percent": 97.0}


def test_rewards_of_a_preference_loss() -> None:
    rewards = {"rewards_chosen": 0.5, "rewards_rejected": -0.25, "reward_accuracy": 1.0, "reward_margin": 0.75}
    assert trackers.scalars_of(STEP | rewards) == SCALARS | {f"train/{name}": value for name, value in rewards.items()}
    told = EVAL | {f"eval_{name}": value for name, value in rewards.items()}
    assert trackers.scalars_of(told) == {
        "eval/loss": 1.25,
        **{f"eval/{name}": value for name, value in rewards.items()},
    }


def test_scalars_of_other_events() -> None:
    assert trackers.scalars_of(EVAL) == {"eval/loss": 1.25}
    assert trackers.scalars_of({"kind": "state", "state": "done"}) == {}


def test_trackers_start_with_the_scalars_of_the_configuration(tmp_path: Path) -> None:
    accelerator = Accelerator()
    config = resolve(
        {"data": ["d.json"], "model": "org/m", "lora_r": 4, "tracker_project": "p", "eval_split": 0}
    ).config
    trackers.start(accelerator, config, folder=tmp_path / "run-007")
    ((args, kwargs),) = accelerator.started
    assert args == ("p",)
    assert kwargs["init_kwargs"] == {
        "swanlab": {"experiment_name": "run-007", "logdir": str(tmp_path / "run-007" / "swanlab")}
    }
    told = kwargs["config"]
    assert {key: told[key] for key in ("model", "lora_r", "eval_split", "dtype")} == {
        "model": "org/m",
        "lora_r": 4,
        "eval_split": 0.0,
        "dtype": "auto",
    }
    # Trackers take neither lists nor None.
    assert {type(value) for value in told.values()} <= {str, int, float, bool}
    assert set(told) < set(Config.model_fields)
    assert {"data", "target_modules", "max_steps"}.isdisjoint(told)


def test_an_experiment_may_have_a_name(tmp_path: Path) -> None:
    accelerator = Accelerator()
    trackers.start(accelerator, Config(tracker_name="mine"), folder=tmp_path)
    assert accelerator.started[0][1]["init_kwargs"]["swanlab"]["experiment_name"] == "mine"


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5, 6]), (3, [3, 6]), (4, [4]), (10, [])])
def test_steps_are_logged_as_often_as_asked(every: int, steps: list[int]) -> None:
    accelerator = Accelerator()
    told = Trackers(accelerator, every=every)
    for step in range(1, 7):
        told.log(STEP | {"step": step})
    told.end()
    assert [step for _, step in accelerator.logged] == [*steps, -1]
    assert [values for values, _ in accelerator.logged] == [*[SCALARS] * len(steps), {}]


def test_every_evaluation_is_logged() -> None:
    accelerator = Accelerator()
    told = Trackers(accelerator, every=10)
    for step in range(4):
        told.log(EVAL | {"step": step})
    told.end()
    assert accelerator.logged == [*(({"eval/loss": 1.25}, step) for step in range(4)), ({}, -1)]


class Broken(Accelerator):
    """Raises at the second event, and never ends."""

    def log(self, values: dict[str, float], step: int) -> None:
        super().log(values, step)
        if step == 2:
            raise type("ServiceError", (Exception,), {})("no network")

    def finish(self) -> None:
        time.sleep(60)


def test_a_tracker_that_fails_and_hangs_costs_no_step() -> None:
    accelerator = Broken()
    told = Trackers(accelerator, every=1)
    began = time.monotonic()
    for step in range(1, 5):
        told.log(STEP | {"step": step})
    told.end(timeout_s=0.3)
    assert time.monotonic() - began < 5
    assert [step for _, step in accelerator.logged] == [1, 2, 3, 4]
    assert str(told.problem) == "no network"


def test_a_tracker_that_hangs_is_said() -> None:
    told = Trackers(Broken(), every=1)
    told.end(timeout_s=0.1)
    assert isinstance(told.problem, TimeoutError)


# --- for real ---


def test_tensorboard_holds_what_was_logged(tmp_path: Path) -> None:
    from accelerate import Accelerator as RealAccelerator
    from accelerate.utils import ProjectConfiguration
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run-001"
    project = ProjectConfiguration(project_dir=str(run), logging_dir=str(run / "tensorboard"))
    accelerator = RealAccelerator(log_with=["tensorboard"], project_config=project)
    told = trackers.start(accelerator, resolve({"data": ["d.json"], "model": "org/m"}).config, folder=run)
    for step in (1, 2):
        told.log(STEP | {"step": step, "loss": 2.0 / step})
    told.log(EVAL | {"step": 2})
    told.end()
    assert told.problem is None

    assert [path.name for path in tmp_path.iterdir()] == ["run-001"]
    found: dict[str, list[tuple[int, float]]] = {}
    for file in run.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    assert set(found) == {*SCALARS, "eval/loss"}
    assert found["train/loss"] == [(1, 2.0), (2, 1.0)]
    assert found["eval/loss"] == [(2, 1.25)]
    assert found["train/tokens_per_second"] == [(1, 200.0), (2, 200.0)]


SWANLAB = """
import json, socket, sys
from pathlib import Path

def refuse(self, address):
    if self.family != socket.AF_UNIX:
        attempts.append(str(address))
        raise OSError("no network here")

attempts = []
socket.socket.connect = socket.socket.connect_ex = refuse

from accelerate import Accelerator
from truetune import trackers
from truetune.config import resolve

folder = Path(sys.argv[1])
accelerator = Accelerator(log_with=["swanlab"])
flags = {"data": ["d.json"], "model": "org/m", "tracker_project": "our-project"}
told = trackers.start(accelerator, resolve(flags).config, folder=folder)
for event in json.loads(sys.argv[2]):
    told.log(event)
told.end()
assert told.problem is None, told.problem
print(json.dumps(attempts))
"""


@pytest.mark.slow
def test_swanlab_offline_writes_into_the_run_without_network(tmp_path: Path) -> None:
    run = tmp_path / "run-001"
    run.mkdir()
    events = [STEP | {"step": step, "loss": 2.0 / step} for step in (1, 2)] + [EVAL]
    own = {"SWANLAB_MODE": "offline", "SWANLAB_ROOT": str(tmp_path / "home"), "SWANLAB_API_KEY": ""}
    result = subprocess.run(
        [sys.executable, "-c", SWANLAB, str(run), json.dumps(events)],
        capture_output=True,
        text=True,
        env=os.environ | own,
        cwd=tmp_path,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == []
    # Nothing beside the run: no "swanlog" in the working folder.
    assert {path.name for path in tmp_path.iterdir()} <= {"run-001", "home"}
    (experiment,) = (run / "swanlab").glob("run-*")
    (record,) = experiment.glob("*.swanlab")
    written = record.read_bytes()
    assert b"our-project" in written
    for name in (*SCALARS, "eval/loss"):
        assert name.encode() in written
    assert "lora_r" in (experiment / "files" / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [RuntimeError("not logged in"), ValueError("project name"), OSError("no network")])
def test_tracker_that_cannot_start(error: Exception, tmp_path: Path) -> None:
    """Its own error becomes a fault with a way out, before any step."""

    class Refusing:
        def init_trackers(self, *_: Any, **__: Any) -> None:
            raise error

    with pytest.raises(UserError) as caught:
        trackers.start(Refusing(), Config(report_to=["swanlab"]), folder=tmp_path)
    assert caught.value.key == "tracker_refused"
    assert str(error) in str(caught.value)
