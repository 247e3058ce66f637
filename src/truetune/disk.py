"""Files that survive: written beside their place, made durable, and only then renamed.

.tmp-NAME-PID    being written: nobody reads it, and the next run of the folder removes it
NAME             complete: its manifest, written last, holds the size and sha256 of every file
.trash-NAME-PID  being removed
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from truetune.errors import MachineError, UserError

MANIFEST = "manifest.json"
STAGING, TRASH = ".tmp-", ".trash-"
MARGIN_BYTES = 1 << 20
"""Left free beside what is written: for the log, and for others."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return strict JSON: non-ASCII text as it is, never NaN or Infinity."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)


def write_atomic(path: Path, content: str) -> None:
    """Write `path` so that a reader sees the old or the new content, never a part: temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged(target: Path, **facts: Any) -> Iterator[Path]:
    """Give a folder to write into, which takes the place of `target` when it is complete. `facts`: of its manifest.

    Raises: MachineError if the disk is full, with the numbers; then, as at any fault, `target` is as it was.
    """
    staging = target.with_name(f"{STAGING}{target.name}-{os.getpid()}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        seal(staging, **facts)
        _put(staging, target)
    except Exception as error:
        number = _errno(error)
        if number in FULL:
            raise _disk_full(target, num_bytes=_size(staging)) from error
        if number is None or isinstance(error, OSError):
            raise
        raise OSError(number, os.strerror(number), str(target)) from error
    finally:
        with suppress(OSError):
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Give a path to write to; the file there takes the place of `target`, durably, when it is complete.

    Raises: MachineError if the disk is full, with the numbers; then `target` is as it was.
    """
    staging = target.with_name(f"{STAGING}{target.name}-{os.getpid()}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        path = staging / target.name
        yield path
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        if error.errno in FULL:
            raise _disk_full(target, num_bytes=_size(staging)) from error
        raise
    finally:
        with suppress(OSError):
            shutil.rmtree(staging, ignore_errors=True)


def _errno(error: Exception) -> int | None:
    """Return the system's number of a fault; safetensors and tokenizers, in Rust, tell it only in words."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _put(staging: Path, target: Path) -> None:
    """Rename; what stood there before is moved away first, since a folder is not replaced by another."""
    if target.exists():
        remove(target, then=lambda: staging.rename(target))
    else:
        staging.rename(target)
    sync_folder(target.parent)


def remove(folder: Path, *, then: Callable[[], Any] = lambda: None) -> None:
    """Remove a folder so that a part of it is never found under its name. `then`: done when the name is free."""
    trash = folder.with_name(f"{TRASH}{folder.name}-{os.getpid()}")
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)
    then()
    shutil.rmtree(trash)


def is_leftover(path: Path) -> bool:
    """Return whether a process that died left this: half-written, half-removed."""
    is_file = path.name.startswith(".") and path.suffix == ".tmp"
    return is_file or path.name.startswith((STAGING, TRASH))


def clear_killed(target: Path) -> None:
    """Remove what processes that died while they wrote `target` left beside it; a living one's is not touched."""
    import psutil

    for prefix in (STAGING, TRASH):
        for path in target.parent.glob(f"{prefix}{glob.escape(target.name)}-*"):
            pid = path.name.rpartition("-")[2]
            if pid.isdecimal() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
                shutil.rmtree(path)


def sweep(folder: Path) -> None:
    """Remove what a process that died left in `folder`, which must not be written by another one."""
    for path in filter(is_leftover, folder.glob(".*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise MachineError, with the numbers, if `folder` has no room for `num_bytes` twice and a margin."""
    needed = 2 * num_bytes + MARGIN_BYTES
    if _free(folder) < needed:
        raise _disk_full(folder, num_bytes=needed)


def require_room(folder: Path, num_bytes: int) -> None:
    """Raise MachineError, with the numbers, if all that a run will ever hold in `folder` does not fit there."""
    free = _free(folder) + _size(folder)
    if free < num_bytes:
        values = {"needed": num_bytes / 1e9, "free": free / 1e9}
        raise MachineError("disk_too_small", where=str(folder), fix="disk_too_small", **values)


def require_writable(path: Path) -> None:
    """Raise MachineError if a folder, or the one that it will be made in, may not be written.

    Read-only file systems tell here; what only a write shows, the rehearsal finds.
    """
    place = _existing(path)
    if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
        raise MachineError("not_writable", where=str(path), fix="machine", folder=place)


def file_to_write(name: str) -> Path:
    """Return where to write a file that the user named.

    Raises: UserError if its folder does not exist.
    """
    path = Path(name).expanduser()
    if not path.parent.is_dir():
        raise UserError("no_folder", where=str(path), fix="no_folder", folder=str(path.parent))
    return path


def _disk_full(path: Path, *, num_bytes: int) -> MachineError:
    return MachineError("disk_full", where=str(path), fix="disk_full", needed=num_bytes / 1e6, free=_free(path) / 1e6)


def _free(path: Path) -> int:
    """Return the free bytes where a path is, or will be."""
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next(some for some in (path.absolute(), *path.absolute().parents) if some.exists())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


# --- manifests ---


def seal(folder: Path, **facts: Any) -> None:
    """Fsync every file of `folder`, then write its manifest: `facts`, and size and sha256 of each file."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    write_atomic(folder / MANIFEST, _signed({"format": 1, **facts, "files": files}))
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a sealed folder.

    Raises: OSError or ValueError if it is not there, or damaged.
    """
    content = (folder / MANIFEST).read_text(encoding="utf-8")
    manifest: dict[str, Any] = json.loads(content)
    if content != _signed({key: value for key, value in manifest.items() if key != "sha256"}):
        raise ValueError(MANIFEST)
    return manifest


def damage(folder: Path) -> str | None:
    """Return the file of a sealed folder that is not what its manifest says, or None if all are."""
    try:
        files: Mapping[str, Any] = read_manifest(folder)["files"]
    except (OSError, ValueError):
        return MANIFEST
    for name, expected in files.items():
        try:
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                num_bytes = file.tell()
        except OSError:
            return name
        if (num_bytes, digest) != (expected["bytes"], expected["sha256"]):
            return name
    return None


def _signed(manifest: dict[str, Any]) -> str:
    """Return the manifest's text with the hash of itself, so that damage to it is seen, too."""
    digest = hashlib.sha256(to_json(manifest).encode()).hexdigest()
    return to_json(manifest | {"sha256": digest}, indent=2) + "\n"
