"""Runs made to have a fault: each is found, said in both languages, and found nowhere else without reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from small_base import teach

from truetune import report
from truetune.cli import run
from truetune.messages import CATALOGUES

Train = Callable[..., dict[str, Any]]

SUMS = [{"instruction": f"What is {n} plus {n}?", "output": f"It is {2 * n}."} for n in range(40)]
WORDS = ["sun", "rain", "bread", "stone", "lamp", "fish", "wool", "coal", "milk", "sand", "moss", "salt"]
NOISE = Random(0)
SURPRISES, OTHER_SURPRISES = (
    [{"instruction": f"Say something, {n}", "output": " ".join(NOISE.choices(WORDS, k=6))} for n in range(40)]
    for _ in range(2)
)
"""Answers that follow from nothing: they can only be memorised."""

ECHOES = [{"instruction": f"Sing {n}", "output": "la la la la la la la la la la la la la la la la"} for n in range(40)]
SCHOOL = [
    *({"instruction": f"What is {n} plus {n}?", "output": f"The sum of these is {2 * n}!"} for n in range(0, 40, 2)),
    *({"instruction": f"Tell me of {word}", "output": f"There is {word} la, {word} it is."} for word in WORDS),
]
"""What the base has learned: to answer, to stop, and the words of the other rows."""


ALL = [*SUMS, *SURPRISES, *ECHOES, *SCHOOL]
BASES = {"random": (SCHOOL, 0), "schooled": (SCHOOL, 120), "knowing": (SUMS, 300), "surprised": (OTHER_SURPRISES, 30)}
"""What each base was taught, and in how many steps: nothing; to answer; these answers; words in any order."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make a base of BASES, each once."""
    folder = tmp_path_factory.mktemp("bases")

    def make(name: str) -> Path:
        rows, num_steps = BASES[name]
        path = folder / name
        return path if path.exists() else teach(path, rows=rows, words=ALL, num_steps=num_steps)

    return make


@pytest.fixture
def card_of(tmp_path: Path) -> Train:
    """Train on rows with some keys and return the run's card."""

    def train(rows: list[dict[str, str]], *, model: Path, **keys: Any) -> dict[str, Any]:
        (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
        fixed = {"eval_split": 0.25, "attention": "trie", "max_tokens_per_forward": 2048, "dtype": "float32"}
        flags = [str(part) for key, value in {**fixed, **keys}.items() for part in (f"--{key}", value)]
        out = tmp_path / "out"
        words = ["train", str(tmp_path / "data.json"), "--model", str(model), "--output-dir", str(out), *flags]
        assert run([*words, "--gradient-checkpointing", "false"]) == 0
        card = report.read(out)
        assert card is not None
        return card

    return train


def found(card: dict[str, Any]) -> list[str]:
    """The names of what was found; each is said in both languages."""
    names = [finding["name"] for finding in card["findings"]]
    for lang in CATALOGUES:
        assert len(report.sentences(card, lang)) == len(names) + 1
    return names


LONG = {"learning_rate": 1e-2, "num_train_epochs": 150, "lora_r": 64, "lora_alpha": 64}
FAULTY: dict[str, tuple[str, list[dict[str, str]], dict[str, Any]]] = {
    "no_change_rate": ("schooled", SUMS, {"learning_rate": 1e-7, "num_train_epochs": 1}),
    "no_change_rate_full": (
        "schooled",
        SUMS,
        {"finetuning": "full", "learning_rate": 1e-8, "num_train_epochs": 1},
    ),
    "no_change_steps": ("schooled", SUMS, {"learning_rate": 6e-5, "max_steps": 2}),
    "no_change": ("surprised", SURPRISES, {"learning_rate": 5.1e-5, "num_train_epochs": 11}),
    "learned": ("schooled", SUMS, {"learning_rate": 2e-2, "num_train_epochs": 20}),
    "learned_trained": ("schooled", SUMS, {"learning_rate": 2e-2, "num_train_epochs": 10, "eval_split": 0}),
    "worse": ("knowing", SUMS, {"learning_rate": 1, "max_steps": 3, "result": "last", "attention": "plain"}),
    "overfit_rising": ("surprised", SURPRISES, {**LONG, "eval_steps": 20}),
    "overfit_gap": ("surprised", SURPRISES, {**LONG, "eval_steps": 300, "result": "last"}),
    "repeats": ("schooled", ECHOES, {"learning_rate": 2e-2, "num_train_epochs": 10}),
    "forgot": ("schooled", SUMS, {"learning_rate": 2e-2, "num_train_epochs": 20}),
    "never_stops": ("random", SUMS, {"max_steps": 1}),
    "no_change_known": ("knowing", SUMS, {"learning_rate": 1e-6, "max_steps": 2, "attention": "plain"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTY)
def test_a_run_made_to_have_a_fault(name: str, card_of: Train, base: Callable[[str], Path]) -> None:
    kind, rows, keys = FAULTY[name]
    card = card_of(rows, model=base(kind), **keys)
    assert name in found(card), (card["findings"], card["losses"][-1], card["held_out_losses"])
    # The first one says whether it learned, and rests on the card's own numbers.
    first, *others = found(card)
    assert (card["tuned"]["answer_loss"] < 0.98 * card["base"]["answer_loss"]) == first.startswith("learned")
    assert not {"learned", "learned_trained", "worse"} & set(others)
    if name == "no_change_known":
        assert found(card) == [name]
        assert card["base"]["answer_loss"] < 0.1
        assert card["talk"]["num_equal"] == card["talk"]["num_answers"] == 6
        assert card["talk"]["tuned_ended"] == 1
    if name == "overfit_rising":
        # The result is the best step, and the card is about the result.
        lowest, step = min((loss, step) for step, loss in card["held_out_losses"] if step > 0)
        assert (card["step"], card["tuned"]["loss"]) == (step, pytest.approx(lowest, rel=1e-4))
        assert step < card["num_steps"]
    if name == "never_stops":
        assert card["talk"]["tuned_ended"] == 0


def test_every_finding_has_a_run_that_has_it() -> None:
    """The names in the source, and no others."""
    import ast

    from truetune import diagnosis

    tree = ast.parse(Path(diagnosis.__file__).read_text(encoding="utf-8"))
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding"
    ]
    names = {node.value for call in calls for node in ast.walk(call.args[0]) if isinstance(node, ast.Constant)}
    # Those of preferences have their runs in test_preference_runs.py.
    assert names == {*FAULTY, "preferred", "not_preferred"}
    assert len(names) == 15
