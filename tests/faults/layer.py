"""The fault layer: every write, fsync, rename and removal goes through it, and at the k-th one something happens.

Killed: the operation is not done, nor is any later one, so that the disk stays as a kill -9 would have left it; files
have no buffer of their own. `full`, `broken`: the operation, and all later ones of its kind, fail as the system lets
them. Tensors are written through it as well: safetensors' own writer is in Rust, where nothing can be put between.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OPERATIONS = ("fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir", "sendfile", "ftruncate", "pwrite")
WRITES = {"write", "sendfile", "pwrite", "mkdir", "create"}
CHUNKS = 3
"""Writes of one file of tensors."""


class Killed(BaseException):
    """The process is dead; nothing that it would do is done."""


class Layer:
    """Counts the operations below `root`. `at`: number of the one at which `fault` happens; None: never."""

    def __init__(self, root: Path, *, at: int | None = None, fault: str = "kill") -> None:
        self.root, self.at, self.fault = str(root), at, fault
        self.log: list[tuple[str, str]] = []
        self.is_over = False

    def before(self, name: str, path: Any) -> None:
        """Note an operation, and let it happen or not."""
        place = _place(path)
        if not place.startswith(self.root):
            return
        if self.is_over and self.fault == "kill":
            raise Killed
        self.log.append((name, place.removeprefix(self.root)))
        self.is_over |= len(self.log) == self.at
        if not self.is_over:
            return
        if self.fault == "kill":
            raise Killed
        if self.fault == "full" and name in WRITES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)
        if self.fault == "read-only":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), place)

    def done(self, name: str, path: Any, *rest: Any) -> None:
        """Hear of an operation that was done."""
        place = _place(path)
        if place.startswith(self.root):
            self.after(name, place.removeprefix(self.root), rest)

    def after(self, name: str, path: str, rest: tuple[Any, ...]) -> None:
        """For those who want to know more of it."""


def _place(path: Any) -> str:
    """The path of a name, an open file or a descriptor."""
    return str(Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else Path(path).absolute())


class _File(io.FileIO):
    """A file without a buffer, whose writes are counted."""

    layer: Layer

    def write(self, content: Any) -> int:
        self.layer.before("write", self.fileno())
        done = super().write(content)
        self.layer.done("write", self.fileno(), content)
        return done


@contextmanager
def faults(layer: Layer) -> Iterator[Layer]:
    """Put the layer below everything that is written in this process."""
    import peft.peft_model

    from truetune import checkpoint

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, _counted(layer, name, getattr(os, name)))
        opened = _opened(layer, io.open)
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        patch.setattr(peft.peft_model, "safe_save_file", _save_file)
        patch.setattr(checkpoint, "save_file", _save_file)
        patch.setattr(shutil, "_use_fd_functions", False)  # so that every name is a whole path
        yield layer


def _counted(layer: Layer, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def operation(path: Any, *rest: Any, **options: Any) -> Any:
        # A rename is where it ends, a copy where it writes: that is its first argument.
        layer.before(name, path)
        place = _place(path)
        result = real(path, *rest, **options)
        layer.done(name, place, *rest)
        return result

    return operation


def _opened(layer: Layer, real: Callable[..., Any]) -> Callable[..., Any]:
    def open_file(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        writes = set(mode) & set("wax+")
        if not writes or isinstance(path, int) or not _place(path).startswith(layer.root):
            return real(path, mode, *rest, **options)
        layer.before("create", path)
        file = _File(path, mode.replace("b", "").replace("t", ""))
        file.layer = layer
        layer.done("create", path)
        if "b" in mode:
            return file
        return io.TextIOWrapper(file, encoding=options.get("encoding") or "utf-8", newline="", write_through=True)

    return open_file


def _save_file(tensors: Any, path: Any, metadata: Any = None) -> None:
    from safetensors.torch import save

    content = save(tensors, metadata)
    size = -(-len(content) // CHUNKS)
    with open(path, "wb") as file:  # noqa: PTH123 (the layer's)
        for start in range(0, len(content), size):
            file.write(content[start : start + size])
