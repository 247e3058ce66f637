"""`truetune compare`: base and tuned answers, for given questions or the run's own rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from truetune.cli import run
from truetune.use import load


@pytest.mark.slow
def test_answers_are_those_of_both_models(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(small_run), "-m", "Number 3?", "-m", "你好", "--max-new-tokens", "6", "--lang", "en"]
    assert run(words) == 0
    lines = capsys.readouterr().out.splitlines()
    base, tuned = load(small_run, is_base=True), load(small_run)
    for question in ("Number 3?", "你好"):
        at = lines.index(question)
        assert lines[at + 1] == f"Base   {base.chat(question, max_new_tokens=6)}"
        assert lines[at + 2] == f"Tuned  {tuned.chat(question, max_new_tokens=6)}"


@pytest.mark.slow
def test_held_out_rows_are_the_default(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(small_run), "--max-new-tokens", "2", "--lang", "zh"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("Number ") for line in lines) == 4
    assert sum(line.startswith("微调后") for line in lines) == 4


def test_a_model_alone_has_nothing_to_compare(tiny_qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(tiny_qwen), "-m", "Hi", "--lang", "en"]) == 2
    assert "without an adapter" in capsys.readouterr().err
    assert run(["compare", str(tiny_qwen), "--lang", "en"]) == 2
    assert "-m TEXT" in capsys.readouterr().err
