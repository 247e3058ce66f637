"""Whole or not there: what is staged, sealed and removed; and what a full or closed disk answers."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from truetune import disk
from truetune.errors import MachineError


def _write(folder: Path, **contents: bytes) -> Path:
    with disk.staged(folder, step=3) as staging:
        for name, content in contents.items():
            (staging / name).write_bytes(content)
    return folder


def _fail(folder: Path, content: bytes, error: Exception) -> None:
    with disk.staged(folder) as staging:
        (staging / "x").write_bytes(content)
        raise error


def test_complete_under_its_name(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a" / "out", x=b"1", y=b"")
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "x", "y"]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert disk.damage(folder) is None
    assert disk.read_manifest(folder)["step"] == 3


def test_replaces_what_stood_there(tmp_path: Path) -> None:
    folder = _write(tmp_path / "out", x=b"1", y=b"2")
    _write(folder, z=b"3")
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "z"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_fault_leaves_the_old_one(tmp_path: Path) -> None:
    folder = _write(tmp_path / "out", x=b"1")
    with pytest.raises(KeyError):
        _fail(folder, b"2", KeyError())
    assert (folder / "x").read_bytes() == b"1"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_numbers(number: int, tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        _fail(tmp_path / "out", b"1" * 3_000_000, OSError(number, os.strerror(number)))
    assert (caught.value.key, caught.value.exit_code, caught.value.values["needed"]) == ("disk_full", 3, 3.0)
    assert caught.value.values["free"] > 0
    assert list(tmp_path.iterdir()) == []


def test_other_faults_of_the_system_are_themselves(tmp_path: Path) -> None:
    with pytest.raises(PermissionError):
        _fail(tmp_path / "out", b"", PermissionError(errno.EACCES, "no"))


def test_room_is_asked_for_twice_with_a_margin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_free", lambda _: 10_000_000 + disk.MARGIN_BYTES)
    disk.require_space(tmp_path, 5_000_000)
    with pytest.raises(MachineError) as caught:
        disk.require_space(tmp_path, 5_000_001)
    assert caught.value.key == "disk_full"


def test_room_for_all_that_a_run_will_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the folder holds already needs no room again; both numbers are said."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "weights").write_bytes(bytes(1000))
    monkeypatch.setattr(disk, "_free", lambda _: 9000)
    disk.require_room(tmp_path / "run", 10_000)
    with pytest.raises(MachineError) as caught:
        disk.require_room(tmp_path / "run", 10_001)
    assert caught.value.key == "disk_too_small"
    assert caught.value.values == {"needed": 10_001 / 1e9, "free": 1e-5}


def test_free_bytes_where_a_folder_will_be(tmp_path: Path) -> None:
    assert disk._free(tmp_path / "not" / "yet") == pytest.approx(disk._free(tmp_path), rel=0.01)


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.require_writable(tmp_path / "new" / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(MachineError) as caught:
        disk.require_writable(tmp_path / "new" / "run")
    assert caught.value.values["folder"] == tmp_path


@pytest.mark.parametrize("fault", ["flip", "cut", "longer", "empty", "remove", "folder"])
@pytest.mark.parametrize("name", ["x", "y", "manifest.json"])
def test_damage_is_named(name: str, fault: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "out", x=b"12345", y=b"abcde") / name
    content = path.read_bytes()
    changed = {
        "flip": bytes([content[0] ^ 1]) + content[1:],
        "cut": content[:-1],
        "longer": content + b"1",
        "empty": b"",
    }
    path.unlink() if fault in ("remove", "folder") else path.write_bytes(changed[fault])
    if fault == "folder":
        path.mkdir()
    assert disk.damage(path.parent) == name


def test_sweeping_removes_what_was_left(tmp_path: Path) -> None:
    for name in (".tmp-out-1", ".trash-out-2", "out", ".lock-not"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("1")
    disk.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock-not", "out"]
