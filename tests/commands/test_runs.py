"""`truetune runs`: every run of a folder with its data, model, steps, losses and state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from truetune.cli import run
from truetune.lock import RunLock
from truetune.rundir import RunDir

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _english(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    monkeypatch.chdir(tmp_path)


def make_run(path: Path, events: list[dict[str, Any]], **info: Any) -> None:
    made = RunDir(path)
    made.create()
    made.write_info(**{"data": ["a/rows.json"], "model": "org/name", "steps": 9} | info)
    for event in events:
        made.append(event)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_runs_are_listed_oldest_first(capsys: Capture) -> None:
    evals = [{"kind": "eval", "step": step, "eval_loss": loss} for step, loss in ((0, 3.0), (2, 1.25))]
    steps = [{"kind": "step", "step": step, "loss": 2 / step} for step in (1, 2)]
    make_run(Path("runs/new"), [evals[0], *steps, evals[1]], started="2026-02-02", state="done")
    make_run(Path("runs/old"), [], started="2026-01-01", state="failed", data=["a.json", "b/c.json"])
    assert run(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [cells(line) for line in lines] == [
        ["Run", "Data", "Model", "Steps", "Loss", "Held-out loss", "State"],
        ["runs/old", "a.json, c.json", "name", "0/9", "-", "-", "failed"],
        ["runs/new", "rows.json", "name", "2/9", "1.000", "3.000 → 1.250", "done"],
    ]


@pytest.mark.parametrize(("lang", "expected"), [("en", "No runs under runs.\n"), ("zh", "runs 下没有训练记录。\n")])
def test_no_run_yet_is_no_error(lang: str, expected: str, capsys: Capture) -> None:
    assert run(["runs", "--lang", lang]) == 0
    assert capsys.readouterr() == (expected, "")


def test_another_folder(tmp_path: Path, capsys: Capture) -> None:
    make_run(tmp_path / "elsewhere" / "one", [], state="running")
    (tmp_path / "elsewhere" / "no-run").mkdir()
    assert run(["runs", str(tmp_path / "elsewhere")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(f"{tmp_path / 'elsewhere' / 'one'}  ")
    # Nobody writes into it: it was killed.
    assert lines[1].rstrip().endswith("killed")
    with RunLock(tmp_path / "elsewhere" / "one"):
        assert run(["runs", str(tmp_path / "elsewhere")]) == 0
    assert capsys.readouterr().out.splitlines()[1].rstrip().endswith("running")


def test_a_folder_that_does_not_exist(capsys: Capture) -> None:
    assert run(["runs", "nowhere"]) == 2
    assert capsys.readouterr() == (
        "",
        "nowhere: the folder nowhere does not exist\n  → Check the path, or make the folder first.\n",
    )


def test_a_long_path_is_not_wrapped(capsys: Capture) -> None:
    path = Path("runs") / ("x" * 200)
    make_run(path, [], state="done")
    assert run(["runs"]) == 0
    assert str(path) in capsys.readouterr().out
