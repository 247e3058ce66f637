"""One writer per run folder: a lock that the system gives back when its owner dies, however it dies."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Self

from truetune.disk import to_json
from truetune.errors import MachineError

FILE = ".lock"
LOOK_S = 0.03


class RunLock:
    """Held while it is entered; `.lock` in the run's folder names the owner.

    Raises: MachineError naming the owner, if another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._descriptor = -1

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            if not _try_again(self._descriptor):
                os.close(self._descriptor)
                raise _locked(self._path)
            if _is_at(self._path, self._descriptor):
                break
            # Its owner removed the file between our opening and our locking it.
            os.close(self._descriptor)
        try:
            self._sign()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def _sign(self) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, to_json(owner).encode(), 0)

    def __exit__(self, *_: object) -> None:
        try:
            self._path.unlink(missing_ok=True)
        finally:
            os.close(self._descriptor)


def owner_of(folder: Path) -> dict[str, Any] | None:
    """Return who writes into a run's folder now, or None if nobody does."""
    try:
        descriptor = os.open(folder / FILE, os.O_RDONLY)
    except OSError:
        return None
    try:
        return None if _try(descriptor) else _owner(folder / FILE)
    finally:
        os.close(descriptor)


def refuse_locked(folder: Path) -> None:
    """Raise MachineError naming the owner, if another process writes into the folder."""
    if owner_of(folder) is not None:
        raise _locked(folder / FILE)


def _try(descriptor: int) -> bool:
    """Lock an open file, if nobody else has; closing it gives the lock back."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _try_again(descriptor: int) -> bool:
    """Lock an open file; who only looks whether anybody writes (`owner_of`) holds it for a moment, too."""
    for _ in range(3):
        if _try(descriptor):
            return True
        time.sleep(LOOK_S)
    return False


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(path: Path) -> dict[str, Any]:
    try:
        owner: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"pid": "?", "host": "?", "since": "?"}  # it is just being written
    return owner


def _locked(path: Path) -> MachineError:
    owner = _owner(path)
    values = {name: owner.get(name, "?") for name in ("pid", "host", "since")}
    return MachineError("locked", where=str(path.parent), fix="locked", **values)
