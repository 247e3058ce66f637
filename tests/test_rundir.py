"""A run's folder: atomic writes, events that survive a kill, and which folder a run may have."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from truetune.disk import staged, to_json, write_atomic
from truetune.errors import UserError
from truetune.rundir import Run, RunDir, list_runs, next_run_path, open_output, outcome


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """An empty run."""
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def make_run(folder: Path, **info: str) -> RunDir:
    run = RunDir(folder)
    run.create()
    run.write_info(**info)
    return run


# --- writing ---


def test_write_atomic_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    for content in ("one, longer than two\n", "二\n"):
        write_atomic(path, content)
        assert path.read_text(encoding="utf-8") == content
        assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("truetune.rundir.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text(encoding="utf-8") == "old"


def test_json_is_strict_and_readable() -> None:
    assert to_json({"a": "甄嬛", "b": None}) == '{"a": "甄嬛", "b": null}'
    assert to_json({"a": 1}, indent=2) == '{\n  "a": 1\n}'
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            to_json({"loss": value})


def test_info_is_added_to(run: RunDir) -> None:
    assert not run.is_run
    run.write_info(state="running", steps=3)
    run.write_info(state="done", error=None)
    assert run.is_run
    assert run.read_info() == {"state": "done", "steps": 3, "error": None}


def test_create_makes_the_folders_and_may_be_repeated(run: RunDir) -> None:
    run.create()
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints"]


# --- events ---


def test_events_come_back_in_order(run: RunDir) -> None:
    assert list(run.read_events()) == []
    events = [{"kind": "step", "step": number, "loss": 1 / (number + 1)} for number in range(5)]
    for event in events:
        run.append(event)
    assert list(run.read_events()) == events
    assert len(run.events.read_text(encoding="utf-8").splitlines()) == 5


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_last_line_cut_by_a_kill_is_left_out(cut: int, run: RunDir) -> None:
    for number in range(3):
        run.append({"kind": "step", "step": number, "loss": 1.5})
    content = run.events.read_text(encoding="utf-8")
    run.events.write_text(content[: -cut - 1], encoding="utf-8")
    assert [event["step"] for event in run.read_events()] == [0, 1]


def test_cut_back_drops_what_came_later(run: RunDir) -> None:
    for number in range(1, 6):
        run.append({"kind": "step", "step": number})
        run.append({"kind": "eval", "step": number, "eval_loss": 1.0})
        run.append_step_rows(number, [number, number + 1])
    run.append({"kind": "state", "state": "stopped"})
    run.cut_back(3)
    assert [(event["kind"], event.get("step")) for event in run.read_events()] == [
        *((kind, number) for number in (1, 2, 3) for kind in ("step", "eval")),
        ("state", None),
    ]
    lines = [json.loads(line) for line in run.steps.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"step": number, "rows": [number, number + 1]} for number in (1, 2, 3)]


def test_cut_back_before_the_first_step_empties_both_files(run: RunDir) -> None:
    run.append({"kind": "eval", "step": 0, "eval_loss": 1.0})
    run.append({"kind": "step", "step": 1})
    run.append_step_rows(1, [3])
    run.cut_back(-1)
    assert run.events.read_text(encoding="utf-8") == run.steps.read_text(encoding="utf-8") == ""


def test_cut_back_mends_a_cut_line_so_that_the_next_event_is_whole(run: RunDir) -> None:
    run.append({"kind": "step", "step": 1})
    with run.events.open("a", encoding="utf-8") as file:
        file.write('{"kind": "step", "st')
    run.cut_back(1)
    run.append({"kind": "step", "step": 2})
    assert [event["step"] for event in run.read_events()] == [1, 2]


# --- outcome ---


def test_outcome_of_nothing(run: RunDir) -> None:
    assert outcome(run) == Run(run.path, 0, None, None, None)


def test_outcome_is_what_the_events_say(run: RunDir) -> None:
    for event in (
        {"kind": "eval", "step": 0, "eval_loss": 3.0},
        {"kind": "step", "step": 1, "loss": 2.5},
        {"kind": "eval", "step": 1, "eval_loss": 2.0},
        {"kind": "step", "step": 2, "loss": 1.5},
        {"kind": "eval", "step": 2, "eval_loss": 1.25},
    ):
        run.append(event)
    assert outcome(run) == Run(run.path, steps=2, loss=1.5, eval_loss_before=3.0, eval_loss_after=1.25)


def test_outcome_without_held_out_rows(run: RunDir) -> None:
    run.append({"kind": "step", "step": 1, "loss": 2.5})
    assert outcome(run) == Run(run.path, 1, 2.5, None, None)


# --- names and lists ---


def test_runs_are_numbered(tmp_path: Path) -> None:
    assert next_run_path("x/rows.json", "Qwen/Qwen3-4B", root=tmp_path) == tmp_path / "rows-Qwen3-4B-001"
    (tmp_path / "rows-Qwen3-4B-001").mkdir()
    (tmp_path / "rows-Qwen3-4B-007").mkdir()
    (tmp_path / "other-Qwen3-4B-009").mkdir()
    (tmp_path / "rows-Qwen3-4B-new").mkdir()
    assert next_run_path("rows.json", "Qwen/Qwen3-4B", root=tmp_path) == tmp_path / "rows-Qwen3-4B-008"


@pytest.mark.parametrize(
    ("data", "model", "name"),
    [
        ("my rows (1).json", "m", "my-rows-1-m-001"),
        ("数据.json", "模型", "数据-模型-001"),
        ("a.json", "/models/tiny/", "a-tiny-001"),
        ("folder/", "m.gguf", "folder-m-001"),
        (".", "m", "data-m-001"),
        ("a*[b]?.json", "m", "a-b-m-001"),
    ],
)
def test_names_of_runs_are_names_of_folders(data: str, model: str, name: str, tmp_path: Path) -> None:
    path = next_run_path(data, model, root=tmp_path)
    assert path == tmp_path / name
    path.mkdir()
    assert next_run_path(data, model, root=tmp_path).name == name.replace("001", "002")


def test_runs_are_listed_oldest_first(tmp_path: Path) -> None:
    make_run(tmp_path / "a", started="2026-03-01T00:00:00+00:00")
    same = ["g", "c", "f", "b", "e", "h"]
    for name in same:
        make_run(tmp_path / name, started="2026-01-01T00:00:00+00:00")
    make_run(tmp_path / "d")
    (tmp_path / "no-run").mkdir()
    assert [run.path.name for run in list_runs(tmp_path)] == ["d", *sorted(same), "a"]
    assert list_runs(tmp_path / "missing") == []


# --- which folder a run may have ---


def _nothing(path: Path) -> None:
    """The folder does not exist."""


def _empty(path: Path) -> None:
    path.mkdir()


def _file(path: Path) -> None:
    path.write_text("mine", encoding="utf-8")


def _files(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("mine", encoding="utf-8")


def _run(path: Path) -> None:
    make_run(path, state="stopped")


OUTPUTS = [
    (_nothing, False, None),
    (_nothing, True, "output_no_run"),
    (_empty, False, None),
    (_empty, True, "output_no_run"),
    (_file, False, "output_is_file"),
    (_file, True, "output_is_file"),
    (_files, False, "output_not_empty"),
    (_files, True, "output_no_run"),
    (_run, False, "output_has_run"),
    (_run, True, None),
]


@pytest.mark.parametrize(("prepare", "resume", "key"), OUTPUTS)
def test_which_output_folders_are_taken(prepare: object, resume: bool, key: str | None, tmp_path: Path) -> None:
    path = tmp_path / "out"
    assert callable(prepare)
    prepare(path)
    before = sorted(tmp_path.rglob("*"))
    if key is None:
        assert open_output(path, resume=resume).path == path
    else:
        with pytest.raises(UserError) as caught:
            open_output(path, resume=resume)
        assert (caught.value.key, caught.value.where) == (key, str(path))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_table_of_outputs_is_whole() -> None:
    assert len({(prepare, resume) for prepare, resume, _ in OUTPUTS}) == 10


def test_outcome_is_that_of_the_adapter(run: RunDir) -> None:
    """Where an earlier step became the result, its held-out loss is what training achieved."""
    for step, loss in ((0, 3.0), (4, 1.0), (8, 2.0)):
        run.append({"kind": "eval", "step": step, "eval_loss": loss})
    assert outcome(run).eval_loss_after == 2.0
    with staged(run.result, step=4):
        pass
    assert (outcome(run).eval_loss_before, outcome(run).eval_loss_after) == (3.0, 1.0)


def test_lines_that_a_full_disk_does_not_take_wait(run: RunDir) -> None:
    """Nothing is half written meanwhile; with room again all are there, in order."""
    import resource

    run.append({"kind": "step", "step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = run.events.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, before[1]))
    try:
        run.append({"kind": "step", "step": 2})
        run.append({"kind": "step", "step": 3})
        assert run.has_waiting_lines
        assert run.events.stat().st_size == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run.append({"kind": "step", "step": 4})
    assert not run.has_waiting_lines
    assert [event["step"] for event in run.read_events()] == [1, 2, 3, 4]


def test_syncing_writes_what_waits(run: RunDir) -> None:
    run._waiting[run.events] = b'{"kind": "step", "step": 1}\n'
    run.sync_lines()
    assert [event["step"] for event in run.read_events()] == [1]
    assert not run.has_waiting_lines
