"""The folder of a search: every line is final, a cut one is as if it had not been, and nothing else is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from truetune.errors import MachineError, UserError
from truetune.search import COMPLETE, Trial
from truetune.tunedir import TuneDir, open_search


def made(number: int) -> Trial:
    """A trial."""
    return Trial(number, COMPLETE, {"learning_rate": 1e-4, "lora_r": 8}, ((0, 2.0), (4, 1.0)), 1.0, 0.5, (4.0,), (4,))


def test_a_line_that_a_kill_cut_is_cut_away_wherever_it_was_cut(tmp_path: Path) -> None:
    folder = TuneDir(tmp_path)
    assert folder.read_trials() == []
    for number in range(2):
        folder.append(made(number))
    whole = folder.trials.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(first, len(whole)):
        folder.trials.write_bytes(whole[:size])
        assert folder.read_trials() == [made(0)]
        folder.append(made(1))
        assert folder.trials.read_bytes() == whole


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no search to continue"):
        open_search(tmp_path / "none", resume=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a folder"):
        open_search(tmp_path / "file", resume=False)
    with pytest.raises(UserError, match="not empty"):
        open_search(tmp_path, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_search_is_only_opened_to_go_on(tmp_path: Path) -> None:
    folder = open_search(tmp_path / "new", resume=False)
    folder.path.mkdir()
    folder.begin("seed: 1\n", {"given": {}})
    assert open_search(folder.path, resume=True).read_info() == {"given": {}}
    with pytest.raises(UserError, match="holds a search already"):
        open_search(folder.path, resume=False)


@pytest.mark.parametrize("left", [(), (".lock",), (".lock", "config.yaml"), (".config.yaml.tmp",)])
def test_killed_before_its_first_file_it_can_be_begun_or_resumed(left: tuple[str, ...], tmp_path: Path) -> None:
    for name in left:
        (tmp_path / name).write_text("x")
    for resume in (False, True):
        assert not open_search(tmp_path, resume=resume).is_search


def test_a_full_disk_leaves_the_lines_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = TuneDir(tmp_path)
    folder.append(made(0))
    monkeypatch.setattr("truetune.disk._free", lambda _: 0)
    with pytest.raises(MachineError, match="disk is full"):
        folder.append(made(1))
    assert folder.read_trials() == [made(0)]
