"""Which base it is: sha256 over the configuration and every byte of the weights, computed once for each file.

The hash of a file is kept in the user's cache under its path, size and time of change (ns), so that the second start
does not read gigabytes again. A file that is changed and given its old size and time back is not noticed there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from truetune.config import cache_dir
from truetune.disk import write_atomic
from truetune.weights import weight_files


def hash_file(path: Path) -> str:
    """Return the sha256 of a file; from the cache if path, size and time of change are those of an earlier call."""
    about = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\n{about.st_size}\n{about.st_mtime_ns}".encode()).hexdigest()
    kept = cache_dir() / "hashes" / key
    if kept.is_file():
        return kept.read_text(encoding="ascii")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(kept, digest)
    return digest


def hash_folder(folder: Path) -> str:
    """Return a sha256 over config.json and every weight file of a model: names and all bytes."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        digest.update(f"{path.name}:{hash_file(path)}\n".encode())
    return digest.hexdigest()
