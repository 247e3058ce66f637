"""`truetune chat`: once, in turns, with the newest run, and when it is interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from truetune.cli import run
from truetune.use import Model


@pytest.fixture(scope="module")
def home(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run under runs/."""
    folder = tmp_path_factory.mktemp("chat")
    rows = [{"instruction": f"Number {n}", "output": f"{n}"} for n in range(8)]
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    words = ["--model", str(tiny_qwen), "--max-steps", "1", "--output-dir", str(folder / "runs" / "r")]
    assert run(["train", str(folder / "data.json"), *words]) == 0
    return folder


def typed(lines: list[str | type[BaseException]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `input` give these lines, or raise these."""
    pending = iter(lines)

    def answer(_prompt: str) -> str:
        line = next(pending)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", answer)


def test_newest_run_is_the_default(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No argument: the newest run under ./runs, and it says which."""
    monkeypatch.chdir(home)
    assert run(["chat", "-m", "Number 1", "--max-new-tokens", "3"]) == 0
    printed = capsys.readouterr()
    assert "runs/r" in printed.err
    assert "runs/r" not in printed.out


def test_turns_are_remembered_until_new(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question carries the turns before it; /new forgets them; Ctrl-D and /exit leave."""
    asked: list[list[str]] = []

    def stream(self: Model, messages: list[dict[str, Any]], **_: Any) -> Iterator[str]:
        asked.append([message["content"] for message in messages])
        yield "Yes."

    monkeypatch.setattr(Model, "stream", stream)
    monkeypatch.chdir(home)
    typed(["One", "", "Two", "/new", "Three", EOFError], monkeypatch)
    assert run(["chat", "runs/r"]) == 0
    assert asked == [["One"], ["One", "Yes.", "Two"], ["Three"]]
    typed(["/exit"], monkeypatch)
    assert run(["chat", "runs/r"]) == 0


def test_ctrl_c_ends_an_answer_not_the_talk(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The half answer is forgotten, the next question is answered."""
    calls = iter([KeyboardInterrupt, None])

    def stream(self: Model, messages: list[dict[str, Any]], **_: Any) -> Iterator[str]:
        yield f"to {len(messages)}"
        error = next(calls)
        if error:
            raise error

    monkeypatch.setattr(Model, "stream", stream)
    monkeypatch.chdir(home)
    typed(["One", "Two", KeyboardInterrupt], monkeypatch)
    assert run(["chat", "runs/r"]) == 0
    assert capsys.readouterr().out.count("to 1") == 2


@pytest.mark.parametrize(("words", "lang"), [(["--max-new-tokens", "0"], "en"), (["--temperature", "3"], "zh")])
def test_bad_options(words: list[str], lang: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Out of range: exit 2, and where to look."""
    assert run(["chat", "x", *words, "--lang", lang]) == 2
    assert "truetune chat --help" in capsys.readouterr().err
