"""`truetune serve`: what it refuses before it loads anything (tests/serve has the rest)."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from truetune.cli import run

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_other_addresses_need_a_token(host: str, capsys: Capture) -> None:
    assert run(["serve", "x", "--host", host]) == 2
    assert "--token-file" in capsys.readouterr().err


def test_a_token_that_others_can_read_is_refused(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "token"
    path.write_text("x" * 40)
    path.chmod(0o644)
    assert run(["serve", "x", "--token-file", str(path)]) == 2
    err = capsys.readouterr().err
    assert f"chmod 600 {path}" in err
    assert "xxxx" not in err


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_port_in_use(lang: str, capsys: Capture) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert run(["serve", "x", "--port", str(port), "--lang", lang]) == 3
    err = capsys.readouterr().err
    assert str(port) in err
    assert "--port N" in err


def test_bad_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    for words in (["--port", "0"], ["--port", "70000"], ["--engine", "x"]):
        assert run(["serve", "x", *words]) == 2
    monkeypatch.chdir(tmp_path)
    assert run(["serve"]) == 2
    assert run(["serve", str(tmp_path / "nothing"), "--port", "18999"]) == 2
    assert capsys.readouterr().out == ""
