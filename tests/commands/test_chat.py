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


def test_turns_are_remembered_until_reset(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question carries the turns before it; /reset forgets them; Ctrl-D and /exit leave."""
    asked: list[list[str]] = []

    def stream(self: Model, messages: list[dict[str, Any]], **_: Any) -> Iterator[str]:
        asked.append([message["content"] for message in messages])
        yield "Yes."

    monkeypatch.setattr(Model, "stream", stream)
    monkeypatch.chdir(home)
    typed(["One", "", "Two", "/reset", "Three", EOFError], monkeypatch)
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


def test_slash_commands(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """/base asks the base the same and is forgotten; /system and /save carry what was said; a typo shows the list."""
    asked: list[tuple[bool, list[tuple[str, str]]]] = []

    def stream(self: Model, messages: list[dict[str, Any]], **_: Any) -> Iterator[str]:
        is_base = any(getattr(part, "disable_adapters", None) is True for part in self.model.modules())
        asked.append((is_base, [(message["role"], message["content"]) for message in messages]))
        yield "<think>\nHm"
        yield "m</think>\n\nNo."

    monkeypatch.setattr(Model, "stream", stream)
    monkeypatch.chdir(home)
    lines = ["/save", "/base", "One", "/base", "Two", "/system Be brief.", "/sav", "/etc is what?", "/save kept.jsonl"]
    typed([*lines, "/save no/such/folder", "/system", "Three", "/exit"], monkeypatch)
    assert run(["chat", "runs/r", "--lang", "en"]) == 0
    one, answered = ("user", "One"), ("assistant", "No.")
    assert asked == [
        (False, [one]),
        (True, [one]),
        (False, [one, answered, ("user", "Two")]),
        (False, [("system", "Be brief."), ("user", "/etc is what?")]),
        (False, [("user", "Three")]),
    ]
    kept = [json.loads(line) for line in (home / "kept.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kept == [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "/etc is what?"},
                {"role": "assistant", "content": "No.", "reasoning_content": "Hmm"},
            ]
        }
    ]
    printed = capsys.readouterr()
    for part in ("nothing was said", "no question yet", "/reset starts over", "cannot be written"):
        assert part in printed.out
    # What was kept can be trained on, and is learned as it was said.
    assert (
        run(["check", "kept.jsonl", "--model", str(json.loads((home / "runs/r/run.json").read_text())["model"])]) == 0
    )


def test_drawn_answers_need_a_seed_to_come_again(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "chat",
        str(home / "runs" / "r"),
        "-m",
        "Hi",
        "--max-new-tokens",
        "8",
        "--temperature",
        "1",
        "--top-p",
        "0.9",
    ]
    answers = []
    for seed in ("1", "1", "2"):
        assert run([*words, "--seed", seed]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
