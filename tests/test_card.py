"""The report card's numbers, against the model that PEFT loads from the run's folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from truetune import report
from truetune.card import _choose, _repeated
from truetune.commands.eval import measured
from truetune.data.store import StoredRows
from truetune.generate import Reply
from truetune.records import Row
from truetune.rundir import RunDir
from truetune.use import load


@pytest.mark.slow
def test_its_numbers_are_those_of_the_adapter_on_disk(small_run: Path) -> None:
    """Losses and answers by the model's own code, from adapter/, without anything of the training process."""
    card = report.read(small_run)
    assert card is not None
    rows = list(StoredRows(small_run / "data" / "eval.arrow"))
    model = load(small_run)
    sides = measured(model, rows)
    assert set(sides) == {"base", "tuned"}
    for name, metrics in sides.items():
        for key, value in metrics.to_dict().items():
            assert card[name][key] == pytest.approx(value, rel=1e-2, abs=1e-2), (name, key)
    assert sides["tuned"].answer_loss < sides["base"].answer_loss
    prompts = [answer["prompt"] for answer in card["answers"]]
    assert len(prompts) == card["talk"]["num_answers"] == 6
    assert Counter(answer["kind"] for answer in card["answers"]) == {"best": 2, "worst": 2, "random": 2}
    by_prompt = {row.prompt[-1]["content"]: row for row in rows}
    assert all(by_prompt[answer["prompt"]].answer == answer["expected"] for answer in card["answers"])


@pytest.mark.slow
def test_what_was_learned_is_counted(small_run: Path) -> None:
    card = report.read(small_run)
    assert card is not None
    steps = [event for event in RunDir(small_run).read_events() if event["kind"] == "step"]
    assert card["num_learned_tokens"] == sum(event["learned_tokens"] for event in steps)
    assert (card["num_rows"], card["num_steps"], card["step"]) == (30, 4, 4)
    assert [loss for _, loss in card["losses"]] == [event["loss"] for event in steps]
    assert card["is_held_out"]
    assert [step for step, _ in card["held_out_losses"]] == [0, 2, 4]


def test_best_worst_and_drawn_rows() -> None:
    """Each row once; few rows make few answers."""
    prompt = ({"role": "user", "content": "?"},)
    rows = [Row(n, "a", (), prompt=prompt) for n in range(9)]
    gains = [3.0, 9.0, 1.0, 5.0, 2.0, 8.0, 4.0, 7.0, 6.0]
    chosen = _choose(rows, gains=gains, seed=0)
    assert chosen[:4] == [(1, "best"), (5, "best"), (2, "worst"), (4, "worst")]
    assert {kind for _, kind in chosen[4:]} == {"random"}
    assert len({number for number, _ in chosen}) == 6
    for count in range(6):
        few = _choose(rows[:count], gains=gains, seed=0)
        assert len({number for number, _ in few}) == len(few) == count
    assert _choose([Row(0, "a", ())], gains=[1.0], seed=0) == []


@pytest.mark.parametrize(
    ("ids", "share"), [((), 0.0), ((1, 2, 3), 0.0), (tuple(range(50)), 0.0), ((5,) * 53, 0.98), ((1, 2) * 20, 0.9459)]
)
def test_repetition(ids: tuple[int, ...], share: float) -> None:
    assert _repeated(Reply("", ids, True)) == pytest.approx(share, abs=1e-3)
