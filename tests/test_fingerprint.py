"""The hash of a base: every byte of it, and quick the second time."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from truetune import fingerprint
from truetune.fingerprint import hash_file, hash_folder


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 8 MB of weights; a cache of its own."""
    monkeypatch.setattr(fingerprint, "cache_dir", lambda: tmp_path / "cache")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(8 << 20))
    return folder / "model.safetensors"


def flip(path: Path, at: int) -> None:
    """Change one byte in place; the size stays."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_it_is_the_sha256(weights: Path) -> None:
    assert hash_file(weights) == hashlib.sha256(bytes(8 << 20)).hexdigest() == hash_file(weights)


@pytest.mark.parametrize("at", [0, 4_000_001, (8 << 20) - 1])
def test_every_byte_counts(at: int, weights: Path) -> None:
    """Between samples, too: 64 places of 64 kB would not see the second one."""
    before = hash_folder(weights.parent)
    flip(weights, at)
    os.utime(weights, ns=(1, 1))
    assert hash_folder(weights.parent) != before


def test_configuration_and_names_count(weights: Path) -> None:
    seen = {hash_folder(weights.parent)}
    (weights.parent / "config.json").write_text("{ }")
    seen.add(hash_folder(weights.parent))
    weights.rename(weights.with_name("model-1.safetensors"))
    seen.add(hash_folder(weights.parent))
    assert len(seen) == 3


def test_the_second_time_the_file_is_not_read(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hash_file(weights)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert hash_file(weights) == first


def test_a_changed_time_or_size_is_read_again(weights: Path) -> None:
    first = hash_file(weights)
    flip(weights, 9)
    os.utime(weights, ns=(7, 7))
    assert hash_file(weights) != first
    weights.write_bytes(bytes(3))
    os.utime(weights, ns=(7, 7))
    assert hash_file(weights) == hashlib.sha256(bytes(3)).hexdigest()
