"""What the report says: counts against a second way of counting, and a diagnosis for each thing that is off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from truetune.config import Config
from truetune.data.prepare import prepare
from truetune.data.template import Renderer, build_renderer
from truetune.messages import text
from truetune.records import Report

OFF = {"enable_thinking": False}


@pytest.fixture(scope="module")
def renderer(qwen_tokenizer: Any) -> Renderer:
    """The renderer of the real Qwen3 tokenizer, without the empty think block."""
    return build_renderer(qwen_tokenizer, [151645, 151643], template_kwargs=OFF)


Check = Callable[..., Report]


@pytest.fixture
def check(renderer: Renderer, write_json: Callable[..., Path]) -> Check:
    """Return the report on rows."""

    def run(rows: list[dict[str, Any]], **config: Any) -> Report:
        return prepare(Config(data=[str(write_json(rows))], **config), renderer).report

    return run


def _rows(count: int = 40) -> list[dict[str, Any]]:
    long = "Some words that make the answer long enough to be worth learning, number"
    return [{"instruction": f"question {number}", "output": f"{long} {number}"} for number in range(count)]


def test_repeats_and_other_answers(check: Check) -> None:
    rows = _rows(10) + _rows(3) + [{"instruction": "question 1", "output": "other"}]
    rows += [{"instruction": "question 9", "output": answer} for answer in ("x", "y")]
    report = check(rows)
    pairs = Counter((row["instruction"], row["output"]) for row in rows)
    answers: dict[str, set[str]] = {}
    for question, answer in pairs:
        answers.setdefault(question, set()).add(answer)
    assert report.exact_duplicates == len(rows) - len(pairs) == 3
    assert report.other_answers == sum(len(answers[row["instruction"]]) > 1 for row in rows) == 6


def test_tokens_of_rejected_answers_do_not_count(check: Check) -> None:
    chosen = [{"prompt": f"q {number}", "chosen": "yes, gladly", "rejected": "no " * 50} for number in range(5)]
    plain = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in chosen]
    names = ("pairs", "learned_tokens", "total_tokens", "trie_tokens", "longest", "learned_template_tokens")
    reports = [check(rows) for rows in (chosen, plain)]
    assert len({tuple(getattr(report, name) for name in names) for report in reports}) == 1


QUIET = {"num_train_epochs": 20}
OTHERS = ["few_steps", "learning_rate", "duplicates", "other_answers", "overlap", "answers_alike", "system_missing"]
OTHERS += ["template_share", "one_row", "no_held_out"]
ALIKE = [row | {"output": "I do not know, please ask somebody else about this matter."} for row in _rows()]

FOUND: dict[str, tuple[list[dict[str, Any]], dict[str, Any], set[str]]] = {
    "nothing": (_rows(), {}, set()),
    "few steps": (_rows(), {"num_train_epochs": 1}, {"few_steps"}),
    "rate too high": (_rows(), {"learning_rate": 0.1}, {"learning_rate"}),
    "repeats": ([*_rows(), *_rows(2)], {}, {"duplicates"}),
    "answers differ": ([*_rows(), _rows()[0] | {"output": "something else entirely, and long"}], {}, {"other_answers"}),
    "answers alike": (ALIKE, {}, {"answers_alike"}),
    "system in half": (
        [row | {"system": "S" if n % 2 else ""} for n, row in enumerate(_rows())],
        {},
        {"system_missing"},
    ),
    "system given": (
        [row | {"system": "S" if n % 2 else ""} for n, row in enumerate(_rows())],
        {"system": "S"},
        set(),
    ),
    "system in all": ([row | {"system": "S"} for row in _rows()], {}, set()),
    "short answers": ([row | {"output": str(n)} for n, row in enumerate(_rows())], {}, {"template_share"}),
    "one row": (_rows(1), {"num_train_epochs": 40}, {"one_row", "no_held_out"}),
    "nothing held out": (_rows(), {"eval_split": 0}, {"no_held_out"}),
}


@pytest.mark.parametrize("case", FOUND)
def test_diagnosis(case: str, check: Check) -> None:
    rows, config, found = FOUND[case]
    report = check(rows, **QUIET | config)
    starts = {key: text(f"diagnosis.{key}", **_Anything()).split("\0")[-1] for key in OTHERS}
    said = {key for key, end in starts.items() if any(line.endswith(end) for line in report.diagnosis)}
    assert said == found
    assert len(report.diagnosis) == len(found)


class _Anything:
    """Fills each brace of a text with a mark, whatever its format; no dict, whose keys `**` would copy."""

    class _Mark:
        def __format__(self, _spec: str) -> str:
            return "\0"

    def keys(self) -> list[str]:
        return ["steps", "rate", "count", "share"]

    def __getitem__(self, _name: str) -> Any:
        return self._Mark()


def test_weights_count_in_the_steps(check: Check, write_json: Callable[..., Path], renderer: Renderer) -> None:
    """Rows of an epoch follow the weights; the rest of the report is about the rows as they are."""
    files = [str(write_json(_rows(40)[:20], "a.json")), str(write_json(_rows(40)[20:], "b.json"))]
    plain = prepare(Config(data=files, eval_split=0, batch_size=1, num_train_epochs=1), renderer)
    mixed = prepare(Config(data=files, eval_split=0, batch_size=1, num_train_epochs=1, data_weights=[2, 0.5]), renderer)
    assert (plain.report.steps, mixed.report.steps) == (40, 50)
    assert plain.report.learned_tokens == mixed.report.learned_tokens
    assert mixed.mix is not None
    assert len(mixed.mix) == 50
