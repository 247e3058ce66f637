"""Power loss (F12): what was not synced may be gone, renames may have happened or not; a good checkpoint is there.

A save is recorded operation by operation. For every prefix of it, disks are built as they may be found afterwards:

    contents   of a file whose last write was not synced: nothing at all
    names      of a folder: as they were when it was last synced, or as they are
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from layer import Layer, faults
from test_checkpoint import make_state, save

from truetune import checkpoint

Tree = dict[str, Any]
"""Names of a folder: another folder's Tree, or the number of a file."""


@dataclass
class Disk:
    """A file system: `names` and `contents` as they are; `synced_…` as a power loss would leave them."""

    names: Tree = field(default_factory=dict)
    contents: dict[int, bytes] = field(default_factory=dict)
    synced_names: dict[int, Tree] = field(default_factory=dict)
    synced_contents: dict[int, bytes] = field(default_factory=dict)

    def folder(self, path: str) -> Tree:
        found = self.names
        for part in filter(None, path.split("/")):
            found = found[part]
        return found

    def place(self, path: str) -> tuple[Tree, str]:
        above, _, name = path.rpartition("/")
        return self.folder(above), name

    def lost(self, tree: Tree | None = None, *, keeps_names: bool) -> Tree:
        """What is found after the power was lost: synced contents, below new or synced names."""
        tree = self.names if tree is None else tree
        tree = tree if keeps_names else self.synced_names.get(id(tree), {})
        found: Tree = {}
        for name, entry in tree.items():
            is_folder = isinstance(entry, dict)
            found[name] = (
                self.lost(entry, keeps_names=keeps_names) if is_folder else self.synced_contents.get(entry, b"")
            )
        return found

    def sync(self, entry: Any) -> None:
        if isinstance(entry, dict):
            self.synced_names[id(entry)] = dict(entry)
        else:
            self.synced_contents[entry] = self.contents[entry]


class Recorder(Layer):
    """Keeps a Disk in step with the operations, and a copy of it after each."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.disk = Disk()
        self.states: list[Tree] = []
        self.done_log: list[tuple[str, str]] = []
        for path in sorted(root.rglob("*")):
            above, name = self.disk.place(str(path).removeprefix(self.root))
            above[name] = {} if path.is_dir() else len(self.disk.contents)
            if path.is_file():
                self.disk.contents[above[name]] = path.read_bytes()
        for tree in self._folders(self.disk.names):
            for entry in [tree, *(entry for entry in tree.values() if isinstance(entry, int))]:
                self.disk.sync(entry)

    def _folders(self, tree: Tree) -> Iterator[Tree]:
        yield tree
        for entry in tree.values():
            if isinstance(entry, dict):
                yield from self._folders(entry)

    def after(self, name: str, path: str, rest: tuple[Any, ...]) -> None:
        """Do to the disk what was done."""
        above, last = self.disk.place(path)
        if name in ("rename", "replace"):
            target, new = self.disk.place(str(rest[0]).removeprefix(self.root))
            target[new] = above.pop(last)
        elif name in ("unlink", "rmdir", "remove"):
            del above[last]
        elif name == "mkdir":
            above[last] = {}
        elif name == "create":
            above[last] = len(self.disk.contents)
            self.disk.contents[above[last]] = b""
        elif name == "write":
            self.disk.contents[above[last]] += bytes(rest[0])
        elif name == "fsync":
            self.disk.sync(self.disk.folder(path) if not last else above[last])
        self.done_log.append((name, path))
        self.states += [self.disk.lost(keeps_names=keeps) for keeps in (False, True)]


def _build(tree: Tree, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, entry in tree.items():
        if isinstance(entry, dict):
            _build(entry, folder / name)
        else:
            (folder / name).write_bytes(entry)
    return folder


def test_a_good_checkpoint_is_always_there(tiny_base: Path, tmp_path: Path) -> None:
    """Before the save ends the one before it at least, afterwards the new one, whatever was still in a cache."""
    state = make_state(tiny_base, steps=1)
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        save(folder, step, state)

    recorder = Recorder(folder)
    with faults(recorder):
        save(folder, 3, state)
        checkpoint.prune(folder, keep=2)
    assert len(recorder.states) == 2 * len(recorder.done_log) > 70
    steps = []
    for lost in recorder.states:
        found, _ = checkpoint.find(_build(lost, tmp_path / "lost"))
        assert found is not None
        steps.append(checkpoint.step_of(found))
    renamed = 2 * next(
        n for n, (name, path) in enumerate(recorder.done_log) if name == "rename" and "tmp-checkpoint" in path
    )
    assert set(steps[:renamed]) == {2}
    synced = 2 * next(
        n for n, (name, path) in enumerate(recorder.done_log) if name == "fsync" and path == "" and 2 * n > renamed
    )
    assert set(steps[synced:]) == {3}


class Forgetful(Recorder):
    """A disk on which the syncs of files, or of folders, were never asked for."""

    forgotten: str

    def after(self, name: str, path: str, rest: tuple[Any, ...]) -> None:
        is_folder = Path(self.root + path).is_dir()
        if name != "fsync" or is_folder != (self.forgotten == "folders"):
            super().after(name, path, rest)


@pytest.mark.parametrize("forgotten", ["files", "folders"])
def test_it_would_be_seen(forgotten: str, tiny_base: Path, tmp_path: Path) -> None:
    """Without the syncs a save is not durable, and the test above would say so."""
    state = make_state(tiny_base, steps=1)
    folder = tmp_path / "checkpoints"
    save(folder, 1, state)
    recorder = Forgetful(folder)
    recorder.forgotten = forgotten
    with faults(recorder):
        save(folder, 2, state)
    lost = recorder.disk.lost(keeps_names=forgotten == "files")
    found, _ = checkpoint.find(_build(lost, tmp_path / "lost"))
    assert found is not None
    assert checkpoint.step_of(found) == 1
