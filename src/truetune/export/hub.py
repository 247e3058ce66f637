"""A folder to the Hugging Face hub: only files that a model needs, listed before anything is sent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.errors import UserError

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.gguf", "*.model", "README.md", "vocab.txt", "merges.txt")
SECRET = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16}|ghp_[A-Za-z0-9]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY"
)
MAX_TEXT_BYTES = 64 << 20
"""Larger files are weights; tokenizers are smaller."""


@dataclass(frozen=True)
class Upload:
    """What would be sent: `files` of `folder` (name, bytes), the model card, and what one should know of them."""

    folder: Path
    files: tuple[tuple[str, int], ...]
    card: str
    num_prompts: int


def prepare(folder: Path) -> Upload:
    """Return what is sent of a folder.

    Raises: UserError if it holds no model, a file that looks like a secret, or names a file outside of it.
    """
    chosen = sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if not path.name.startswith(".")})
    if not any(path.suffix in (".safetensors", ".gguf") for path in chosen):
        raise UserError("hub_no_model", where=str(folder), fix="hub_no_model")
    for path in chosen:
        if path.is_symlink() or not path.is_file():
            raise UserError("hub_link", where=str(path), fix="hub_link")
        if path.suffix not in (".safetensors", ".gguf") and path.stat().st_size < MAX_TEXT_BYTES:
            _refuse_secret(path)
    files = tuple((path.name, path.stat().st_size) for path in chosen)
    readme, known = folder / "README.md", folder / "truetune.json"
    card = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    probes = json.loads(known.read_text(encoding="utf-8"))["probes"] if known.is_file() else []
    return Upload(folder, files, card, len(probes))


def _refuse_secret(path: Path) -> None:
    content = path.read_bytes()
    if SECRET.search(content):
        raise UserError("hub_secret", where=str(path), fix="hub_secret")
    if path.suffix == ".json":
        try:
            value = json.loads(content)
        except ValueError:
            raise UserError("identity_damaged", where=str(path), fix="identity_damaged") from None
        for name in _file_names(value):
            if name.startswith((".", "/", "~")) or ".." in Path(name).parts:
                raise UserError("hub_outside", where=str(path), fix="hub_outside", name=name)


def _file_names(value: Any) -> Iterator[str]:
    """Yield the values of keys that name a file: vocab_file, merges_file …"""
    if isinstance(value, dict):
        for key, part in value.items():
            if isinstance(part, str) and key.endswith("_file"):
                yield part
            yield from _file_names(part)
    elif isinstance(value, list):
        for part in value:
            yield from _file_names(part)


def push(upload: Upload, *, repo: str, is_private: bool = True) -> str:
    """Create the repository if it is not there, send the files in one commit, and return the address.

    Raises: UserError if the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repo, private=is_private, exist_ok=True)
        names = [name for name, _ in upload.files]
        done = api.upload_folder(repo_id=repo, folder_path=str(upload.folder), allow_patterns=names)
    except (HfHubHTTPError, HFValidationError, ValueError, OSError) as error:
        raise UserError("hub_refused", where=repo, fix="hub_refused", problem=str(error).split("\n")[0]) from None
    return str(done)
