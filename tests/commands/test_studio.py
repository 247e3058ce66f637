"""`truetune studio`: what it refuses before it listens (tests/studio has the rest)."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from truetune.cli import run

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_other_addresses_need_a_token(host: str, capsys: Capture) -> None:
    assert run(["studio", "--host", host]) == 2
    assert "--token-file" in capsys.readouterr().err


def test_a_root_must_be_a_folder(tmp_path: Path, capsys: Capture) -> None:
    assert run(["studio", "--root", str(tmp_path), "--root", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_a_token_that_others_can_read_is_refused(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "token"
    path.write_text("x" * 40)
    path.chmod(0o644)
    assert run(["studio", "--token-file", str(path)]) == 2
    assert f"chmod 600 {path}" in capsys.readouterr().err


def test_a_port_that_was_asked_for_and_is_taken(capsys: Capture) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert run(["studio", "--port", str(port), "--no-browser"]) == 3
    assert str(port) in capsys.readouterr().err
