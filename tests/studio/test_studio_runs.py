"""The list of runs and one run, against what the command line says of the same folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from truetune.errors import UserError
from truetune.lock import RunLock
from truetune.rundir import RunDir, outcome
from truetune.studio.runs import Runs, row_places


def test_a_run_is_what_the_command_line_says(page: Any, home: Path) -> None:
    run = RunDir(home / "runs" / "one")
    expected, (told, *_) = outcome(run), page.get("runs")
    assert told["name"] == "one"
    assert told["steps"] == expected.steps == told["total_steps"] == 6
    assert told["loss"] == expected.loss
    assert (told["eval_loss_before"], told["eval_loss_after"]) == (expected.eval_loss_before, expected.eval_loss_after)
    assert told["state"] == "done"
    whole = page.get("runs/one")
    assert {key: whole[key] for key in told} == told
    assert whole["report"] == json.loads((run.path / "report.json").read_text())
    assert whole["config"]["system"] == "Count."
    assert {one["name"] for one in whole["checkpoints"]} == {path.name for path in run.checkpoints.iterdir()}
    assert all(one["bytes"] > 1000 for one in whole["checkpoints"])
    assert page.get("runs/one/samples") == [event for event in run.read_events() if event["kind"] == "sample"]


def test_curves_are_the_events(page: Any, home: Path) -> None:
    events = list(RunDir(home / "runs" / "one").read_events())
    steps = [event for event in events if event["kind"] == "step"]
    told = page.get("runs/one/series", keys="loss,grad_norm,gpu_percent,rows_per_s")
    assert told["step"] == [event["step"] for event in steps]
    assert told["loss"] == [event["loss"] for event in steps]
    assert told["grad_norm"] == [event["grad_norm"] for event in steps]
    assert told["gpu_percent"] == [event["gpu_percent"] for event in steps]
    assert told["rows_per_s"] == [event["rows"] / event["seconds"] for event in steps]
    assert told["eval"] == [[event["step"], event["eval_loss"]] for event in events if event["kind"] == "eval"]
    assert len(told["eval"]) >= 3
    part = page.get("runs/one/series", **{"keys": "loss", "from": 2, "to": 4})
    assert (part["step"], part["total"]) == ([2, 3, 4], 6)
    assert page.get("runs/one/series", keys="loss,secret", status=400)["error"]["key"] == "studio_key"
    assert page.get("runs/one/series", **{"from": "x"}, status=400)["error"]["key"] == "studio_words"


def test_states_names_and_damaged_runs(home: Path, tmp_path: Path) -> None:
    first, second, broken = (tmp_path / path for path in ("a/runs/one", "b/one", "a/runs/broken"))
    for path in (first, second, broken):
        shutil.copytree(home / "runs" / "one", path)
    (broken / "run.json").write_text('{"state": "do')
    RunDir(second).write_info(state="running")
    runs = Runs([tmp_path / "a", tmp_path / "b"])
    told = {run["name"]: run for run in runs.listed()}
    assert set(told) == {"one", "one~2", "broken"}
    assert (told["one"]["state"], told["one~2"]["state"]) == ("done", "killed")
    assert told["broken"]["state"] == "failed"
    assert "run.json" in told["broken"]["error"]
    with RunLock(second):
        assert runs.summary("one~2", runs.run("one~2"))["state"] == "running"
    for name in ("../one", "", "two", "runs/one"):
        with pytest.raises(UserError):
            runs.run(name)


def test_a_run_that_was_cut_back_is_told_as_it_is(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "runs" / "one", tmp_path / "runs" / "one")
    runs, run = Runs([tmp_path]), RunDir(tmp_path / "runs" / "one")
    assert len(runs.series("one", ["loss"], first=0, last=None, points=100)["step"]) == 6
    run.cut_back(2)
    assert runs.series("one", ["loss"], first=0, last=None, points=100)["step"] == [1, 2]
    with pytest.raises(UserError):
        runs.step("one", 3)
    assert runs.step("one", 2)[2] == list(run.read_step_rows())[1]["rows"]


def test_nobody_is_stopped_who_does_not_write(page: Any) -> None:
    assert page.post("runs/one/stop", status=400)["error"]["key"] == "studio_not_running"


def test_streamed_rows_are_told_by_their_places(tmp_path: Path) -> None:
    """They are not kept with the run, so the page says where they stand."""
    run = RunDir(tmp_path / "one")
    run.path.mkdir()
    for step in (1, 10, 2):
        run.append_step_rows(step, [step], places=[f"rows.jsonl:{step}"])
    run.append_step_rows(3, [7])
    assert [row_places(run, step) for step in (1, 2, 10, 3, 4)] == [
        ["rows.jsonl:1"],
        ["rows.jsonl:2"],
        ["rows.jsonl:10"],
        [],
        [],
    ]
