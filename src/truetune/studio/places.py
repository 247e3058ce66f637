"""Which files the page may see: those below the folders that were opened to it, wherever links lead."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from truetune.disk import require_space
from truetune.errors import UserError

MAX_UPLOAD_BYTES = 20 << 30
MAX_LISTED = 2000


class Places:
    """`home`: the folder that the studio was started in; paths are relative to it. `roots`: what is open, with home."""

    def __init__(self, home: Path, roots: Sequence[Path] = ()) -> None:
        self.home = home.resolve()
        self.roots = [self.home, *(root.resolve() for root in roots)]
        self.uploads = self.home / "runs" / ".uploads"

    def inside(self, path: str) -> Path:
        """Return a path, absolute and without links.

        Raises: UserError if it is not below one of the roots: whether it exists is not told.
        """
        found = self._inside(path)
        if found is None:
            raise UserError("studio_outside", where=path, fix="studio_outside", roots=", ".join(map(str, self.roots)))
        return found

    def _inside(self, path: str) -> Path | None:
        try:
            found = (self.home / Path(path).expanduser()).resolve()
        except (ValueError, RuntimeError, OSError):
            # A NUL, an unknown ~user, a loop of links.
            return None
        return found if any(found.is_relative_to(root) for root in self.roots) else None

    def listing(self, path: str) -> dict[str, Any]:
        """Return the folders and files of a folder, without hidden ones and links that lead out; by default, of home.

        Raises: UserError if it is outside the roots, or no folder.
        """
        folder = self.inside(path or ".")
        if not folder.is_dir():
            raise UserError("no_folder", where=path, fix="no_folder", folder=path)
        folders: list[str] = []
        files: list[dict[str, Any]] = []
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name.lower())[:MAX_LISTED]:
            target = self._inside(entry.path)
            if entry.name.startswith(".") or target is None:
                continue
            if target.is_dir():
                folders.append(entry.name)
            elif target.is_file():
                files.append({"name": entry.name, "bytes": target.stat().st_size})
        parent = str(folder.parent) if any(folder.parent.is_relative_to(root) for root in self.roots) else None
        others = [str(root) for root in self.roots[1:]] if folder == self.home else []
        return {"path": str(folder), "parent": parent, "folders": [*folders, *others], "files": files}

    async def upload(self, name: str, pieces: AsyncIterator[bytes]) -> Path:
        """Write a file that comes in pieces, under the first free name; a part of it is never found under that name.

        Raises: UserError if it is too large, MachineError if the disk is full.
        """
        self.uploads.mkdir(parents=True, exist_ok=True)
        require_space(self.uploads, 0)
        target = _free(self.uploads / safe_name(name))
        staging = self.uploads / f".{target.name}.{os.getpid()}.tmp"
        num_bytes = 0
        try:
            with staging.open("wb") as file:
                async for piece in pieces:
                    num_bytes += len(piece)
                    if num_bytes > MAX_UPLOAD_BYTES:
                        raise UserError("studio_too_large", where=name, fix="studio_too_large")
                    file.write(piece)
            staging.rename(target)
        finally:
            staging.unlink(missing_ok=True)
        return target


def safe_name(name: str) -> str:
    """Return the last part of a name, without what starts options, hides files, or no file system takes.

    >>> safe_name("../../etc/pass\\0wd"), safe_name("--x.json"), safe_name("老师 1.json"), safe_name("..")
    ('passwd', 'x.json', '老师 1.json', 'data.json')
    """
    kept = re.sub(r"[\x00-\x1f\x7f]", "", re.split(r"[/\\]", name)[-1]).lstrip(".-").strip()
    return kept.encode()[:200].decode(errors="ignore") or "data.json"


def _free(path: Path) -> Path:
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(2, 1_000_000))
    return path if not path.exists() else next(other for other in numbered if not other.exists())
