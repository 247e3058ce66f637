"""What a run leaves: no secrets, no pickle, a card, the state of how it ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from truetune.cli import run
from truetune.errors import NumericsError, Stopped
from truetune.output import record, recorded_state
from truetune.rundir import RunDir

CANARY = "canary-7f3a-secret"


def test_no_secret_of_the_environment_is_written(
    write_json: Callable[..., Path],
    rows: list[dict[str, str]],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens in the environment appear in no file of the run, and the card is YAML with the base's name."""
    for name in ("HF_TOKEN", "SWANLAB_API_KEY", "MODELSCOPE_API_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, CANARY)
    out = tmp_path / "out"
    words = ["--model", str(tiny_base), "--max-steps", "1", "--output-dir", str(out)]
    assert run(["train", str(write_json(rows)), *words]) == 0
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    card = (out / "adapter" / "README.md").read_text()
    assert card.startswith("---\n")
    assert f"base_model: {json.dumps(str(tiny_base))}" in card


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "done"),
        (Stopped(2, where="RUN"), "stopped"),
        (NumericsError("not_finite", where="step 1", fix="not_finite", loss=1, grad_norm=2, rows="a"), "failed"),
    ],
)
def test_state_says_how_it_ended(tmp_path: Path, error: Exception | None, state: str) -> None:
    """Done, stopped or failed, with the error's text."""
    directory = RunDir(tmp_path)

    def work() -> None:
        with recorded_state(directory):
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)):
            work()
    info = directory.read_info()
    assert info["state"] == state
    assert info["error"] == (None if error is None else str(error))


def test_second_ctrl_c_leaves_a_stopped_run(tmp_path: Path) -> None:
    """It ends at once, and the state is not "running" for ever."""
    directory = RunDir(tmp_path)
    with pytest.raises(KeyboardInterrupt), recorded_state(directory):
        raise KeyboardInterrupt
    assert directory.read_info()["state"] == "stopped"


def test_row_ids_go_to_steps_jsonl(tmp_path: Path) -> None:
    """events.jsonl stays small; which rows made a spike is in steps.jsonl."""
    directory = RunDir(tmp_path)
    record(directory, {"kind": "step", "step": 1, "loss": 2.0, "row_ids": [3, 1]})
    record(directory, {"kind": "eval", "step": 1, "eval_loss": 1.0})
    assert [event["kind"] for event in directory.read_events()] == ["step", "eval"]
    assert "row_ids" not in next(directory.read_events())
    assert json.loads(directory.steps.read_text()) == {"step": 1, "rows": [3, 1]}
