"""A step that several ranks share is the step of one: loss, gradient, what is told, and dropout seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_preference import gradient_of, make_engine, some_rows

from truetune.engine import objective as module
from truetune.engine.objective import IMITATION, Share, dropout_seed, held_out, train_step, whole
from truetune.engine.preference import KINDS, Preference

OBJECTIVES: dict[str, Any] = {"sft": IMITATION, **{name: Preference(name, 0.7, 0.3) for name in KINDS}}


def take(engine: Any, objective: Any, share: Share) -> tuple[float, torch.Tensor, dict[str, float], int]:
    """Loss, gradient, what is told, and learned tokens of a share."""
    engine.model.zero_grad(set_to_none=True)
    for weight in engine.model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    forwards = objective.forwards(engine, some_rows(), share=share)
    aim = {"objective": objective, "share": share}
    result = train_step(engine, forwards, seeds=(1, 1), backward=lambda loss: loss.backward(), **aim)
    return result.loss, gradient_of(engine.model), dict(result.told), result.num_learned_tokens


def settled(engine: Any, objective: Any, num_ranks: int) -> list[Share]:
    """The shares of all ranks, which sum what each of them asked the model."""
    shares = [Share(objective.measure(some_rows()), rank, num_ranks) for rank in range(num_ranks)]
    asked: list[list[float]] = []

    def collect(numbers: Sequence[float]) -> list[float]:
        asked.append(list(numbers))
        return [1.0] * len(numbers)

    for share in shares:
        objective.settle(engine, share, total=collect)
    sums = [sum(column) for column in zip(*asked, strict=True)]
    return [objective.settle(engine, share, total=lambda _: sums) for share in shares]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", ["trie", "padded"])
def test_shares_sum_to_the_step(kind: Any, name: str) -> None:
    """Of 2, 3 and 7 ranks (more than there are rows); learned tokens, too."""
    engine, objective = make_engine(kind=kind), OBJECTIVES[name]
    wanted = take(engine, objective, whole(engine, some_rows(), objective=objective))
    for num_ranks in (2, 3, 7):
        parts = [take(engine, objective, share) for share in settled(engine, objective, num_ranks)]
        assert sum(part[0] for part in parts) == pytest.approx(wanted[0], rel=1e-6)
        gradient = torch.stack([part[1] for part in parts]).sum(0)
        assert float((gradient - wanted[1]).norm() / wanted[1].norm()) < 1e-5
        told = {key: sum(part[2][key] for part in parts) for key in wanted[2]}
        assert told == pytest.approx(wanted[2], rel=1e-4, abs=1e-6)
        assert [*parts[-1][2]] == [*wanted[2]]
        assert sum(part[3] for part in parts) == wanted[3]


def test_a_share_measured_alone_is_noticed() -> None:
    """The planted fault: each rank divides by its own learned tokens."""
    engine = make_engine()
    wanted = take(engine, IMITATION, whole(engine, some_rows(), objective=IMITATION))
    parts = [take(engine, IMITATION, Share(None, rank, 2)) for rank in range(2)]
    assert sum(part[0] for part in parts) != pytest.approx(wanted[0], rel=1e-2)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_held_out_shares_sum_to_the_whole(name: str) -> None:
    engine, objective = make_engine(dropout=0.3), OBJECTIVES[name]
    rows = some_rows()
    share = whole(engine, rows, objective=objective)
    wanted = held_out(engine, objective.forwards(engine, rows), objective=objective, share=share)
    parts = [
        held_out(engine, objective.forwards(engine, rows, share=share), objective=objective, share=share)
        for share in settled(engine, objective, 3)
    ]
    assert {key: sum(part[key] for part in parts) for key in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_dropout_seeds_differ() -> None:
    """Every (seed, step, forward) has a seed of its own."""
    seeds = {dropout_seed(a, b, forward=c) for a in range(5) for b in range(20) for c in range(5)}
    assert len(seeds) == 500


def test_every_forward_of_every_rank_has_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And rank 0 of one has those of a process alone."""
    drawn: list[int] = []
    monkeypatch.setattr(module, "dropout_seed", lambda *_, forward: drawn.append(forward) or 0)
    engine = make_engine(max_tokens=8)
    forwards = IMITATION.forwards(replace(engine, max_tokens=8), some_rows())
    assert len(forwards) >= 3
    for share in (Share(), *(Share(99, rank, 3) for rank in range(3))):
        train_step(engine, forwards, seeds=(0, 1), backward=lambda _: None, share=share)
    num = len(forwards)
    assert drawn[:num] == list(range(num))
    assert sorted(drawn[num:]) == list(range(3 * num))
