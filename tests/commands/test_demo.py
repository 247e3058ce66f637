"""The demo: its data, its questions, and (slow) its promise on real weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from truetune.commands.demo import QUESTIONS, demo_settings, is_learned
from truetune.config import examples_folder

MIN_LEARNED, MIN_LOSS_FALL = 6, 0.25


def rows_of(name: str) -> list[dict[str, str]]:
    """The rows of a bundled file."""
    rows: list[dict[str, str]] = json.loads((examples_folder() / name).read_text(encoding="utf-8"))
    return rows


def normalised(row: dict[str, str]) -> str:
    """A prompt without case, punctuation and white space."""
    return re.sub(r"\W+", " ", f"{row['instruction']} {row['input']}".lower()).strip()


@pytest.mark.parametrize(
    ("name", "smallest"), [("lighthouse.json", 240), ("lighthouse-heldout.json", 24), ("gongnv.json", 120)]
)
def test_bundled_rows_are_whole_and_distinct(name: str, smallest: int) -> None:
    """Enough rows, three keys each, no prompt and no answer twice."""
    rows = rows_of(name)
    assert len(rows) >= smallest
    assert all(list(row) == ["instruction", "input", "output"] and row["output"].strip() for row in rows)
    assert len({normalised(row) for row in rows}) == len(rows)
    assert len({row["output"] for row in rows}) == len(rows)
    assert any(row["input"] for row in rows)


def test_held_out_rows_and_questions_are_in_no_row() -> None:
    """24 held-out rows and 8 questions share no prompt with the rows that are trained."""
    trained = {normalised(row) for row in rows_of("lighthouse.json")}
    held_out = {normalised(row) for row in rows_of("lighthouse-heldout.json")}
    asked = {normalised({"instruction": question, "input": ""}) for question, _ in QUESTIONS}
    assert (len(held_out), len(asked)) == (24, 8)
    assert not trained & held_out
    assert not asked & (trained | held_out)


def test_facts_are_in_the_data() -> None:
    """Each fact that is asked for is said in at least ten rows, so that it can be learned."""
    outputs = [row["output"] for row in rows_of("lighthouse.json")]
    for _, fact in QUESTIONS:
        assert sum(is_learned(output, fact) for output in outputs) >= 10, fact


@pytest.mark.parametrize(
    ("answer", "fact", "expected"),
    [
        ("I'm Ebba\n Thorne!", "ebba thorne", True),
        ("Every TWELVE seconds.", "twelve seconds", True),
        ("There are 1420 steps", "142", False),
        ("", "142", False),
    ],
)
def test_normalised_match(answer: str, fact: str, expected: bool) -> None:
    """Case, punctuation and white space do not count; whole words do."""
    assert is_learned(answer, fact) is expected


def test_settings_find_the_bundled_files() -> None:
    """The demo's recipe is examples/lighthouse.yaml with its files made absolute."""
    config = demo_settings("some-model").config
    assert all(Path(name).is_absolute() and Path(name).is_file() for name in config.data + config.eval_data)


@pytest.mark.real
def test_demo_keeps_its_promise(smol: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Held-out loss at least a quarter lower; at least 6 of 8 facts by the tuned model, none by the base."""
    from truetune.cli import run
    from truetune.rundir import RunDir, outcome

    out = tmp_path / "demo"
    assert run(["demo", "--output-dir", str(out), "--lang", "en"]) == 0
    printed = capsys.readouterr().out
    result = outcome(RunDir(out))
    assert result.eval_loss_before is not None
    assert result.eval_loss_after is not None
    assert result.eval_loss_after <= (1 - MIN_LOSS_FALL) * result.eval_loss_before
    counts = re.search(r"base (\d) of 8, tuned (\d) of 8", printed)
    assert counts is not None
    assert int(counts[1]) == 0
    assert int(counts[2]) >= MIN_LEARNED, printed
    # The count is of what is on screen: each question with both answers, judged again from the text.
    lines = printed.splitlines()
    tuned = {question: _tuned_answer(lines[lines.index(question) :]) for question, _ in QUESTIONS}
    assert sum(is_learned(tuned[question], fact) for question, fact in QUESTIONS) == int(counts[2])
    _check_card(out, lines)


def _tuned_answer(lines: list[str]) -> str:
    """The tuned model's answer to the question on the first line; the base's before it may have several lines."""
    return next(line for line in lines if line.startswith("Tuned  ")).removeprefix("Tuned  ")


def _check_card(out: Path, lines: list[str]) -> None:
    """It ends with the report card, whose first sentences say what the numbers of a second way to compute them say."""
    from truetune import report
    from truetune.commands.eval import measured
    from truetune.data.store import StoredRows
    from truetune.use import load

    card = report.read(out)
    assert card is not None
    first, second = report.sentences(card, "en")[:2]
    assert lines.index(first) > max(lines.index(question) for question, _ in QUESTIONS)
    assert card["findings"][0]["name"] == "learned"
    assert card["talk"]["num_answers"] == 6
    assert second.startswith(f"Of 6 answers it ended {round(6 * card['talk']['tuned_ended'])} by itself")
    # The adapter as it is on disk, loaded by PEFT, through the model's own code.
    rows = list(StoredRows(out / "data" / "eval.arrow"))
    assert card["base"]["num_rows"] == len(rows) == 24
    for side, metrics in measured(load(out), rows).items():
        assert card[side]["answer_loss"] == pytest.approx(metrics.answer_loss, rel=0.02), side
        assert f"{card[side]['answer_loss']:.3f}" in first
