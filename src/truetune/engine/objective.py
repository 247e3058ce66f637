"""What is learned of rows, and one optimizer step of it: rows → forwards → loss → gradient.

An objective says which pairs of rows are computed, and what each forward adds to the loss of a step. Of answers to
imitate that is the sum over edges divided by the learned tokens of the whole step, so it does not depend on how the
step is split (transformers#34191 is the bug of dividing per forward); of preferences see preference.py.

Several ranks share a step: each computes its own forwards, measured by the whole step, and all are summed:

    step     rows 1 2 3 4, measure 99 learned tokens
    rank 0   rows 1 3, loss 40 / 99            rank 1   rows 2 4, loss 59 / 99            loss: the sum of both
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from truetune.engine.deal import deal
from truetune.engine.step import ATTENTIONS, Engine, Forward, evaluating, forward_loss, make_forwards, running
from truetune.records import Pair, Row, pairs_of

Total = Callable[[Sequence[float]], list[float]]
"""Sums numbers over all ranks."""


@dataclass(frozen=True)
class Share:
    """A rank's part of a step.

    `measure`: what the objective says of the whole step, whoever computes it; None: of the forwards alone. `rank` of
    `num_ranks`: every forward of the step, on whichever rank, has a dropout seed of its own.
    """

    measure: Any = None
    rank: int = 0
    num_ranks: int = 1


WHOLE = Share()


@dataclass(frozen=True)
class StepResult:
    """`loss`: what the objective says of the step; of answers to imitate, the mean over learned tokens, in nats.

    `num_learned_tokens` and `num_tokens` (computed, padding included): of the forwards. `told`: what the objective
    tells beside its loss. Of a share: what it adds to each.
    """

    loss: float
    num_learned_tokens: int
    num_tokens: int
    told: Mapping[str, float] = field(default_factory=dict)


class Aim(Protocol):
    """One step of an objective."""

    def share(self, number: int) -> torch.Tensor:
        """Return what a forward, by its number, adds to the step's loss."""

    def told(self) -> dict[str, float]:
        """Return what there is to tell beside the loss, when every share was asked for; of ranks, what this one adds.

        The names are the same on every rank.
        """


class Objective(Protocol):
    """What is learned of rows."""

    def pairs(self, rows: Sequence[Row]) -> list[Pair]:
        """Return the pairs that are computed."""

    def least_tokens(self, row: Row) -> int:
        """Return the tokens of a row that no forward can split."""

    def forwards(self, engine: Engine, rows: Sequence[Row], *, share: Share = WHOLE) -> list[Forward]:
        """Return the forwards of a step, of several ranks those of a share.

        No weights are touched, so another thread may call it ahead of time.
        """

    def measure(self, rows: Sequence[Row]) -> Any:
        """Return what the loss of a step is measured by; no weights are touched."""

    def settle(self, engine: Engine, share: Share, *, total: Total) -> Share:
        """Return the share with what the model itself says of the measure; all ranks call this together."""

    def aim(self, engine: Engine, forwards: Sequence[Forward], *, share: Share = WHOLE) -> Aim:
        """Return the loss of a step, forward by forward."""


@dataclass(frozen=True)
class Imitation:
    """Answers are learned as they are: cross-entropy, the mean over the learned tokens of a step."""

    def pairs(self, rows: Sequence[Row]) -> list[Pair]:
        """Return every pair."""
        return pairs_of(rows)

    def least_tokens(self, row: Row) -> int:
        """Return the tokens of its longest pair."""
        return max(map(len, row.pairs))

    def forwards(self, engine: Engine, rows: Sequence[Row], *, share: Share = WHOLE) -> list[Forward]:
        """Return the forwards of a step."""
        dealt = deal(pairs_of(rows), share.num_ranks, is_shared=engine.kind in ATTENTIONS)
        return make_forwards(engine, dealt[share.rank])

    def measure(self, rows: Sequence[Row]) -> int:
        """Return the learned tokens."""
        return sum(len(pair.answer_ids) for pair in pairs_of(rows))

    def settle(self, engine: Engine, share: Share, *, total: Total) -> Share:  # noqa: ARG002 (nothing to ask)
        """Return the share: its tokens are counted, and the model has no say."""
        return share

    def aim(self, engine: Engine, forwards: Sequence[Forward], *, share: Share = WHOLE) -> Aim:
        """Return what each forward adds to the loss of a step."""
        learned = share.measure if share.measure is not None else _num_learned(forwards)
        return _Learned(engine, forwards, learned)


@dataclass(frozen=True)
class _Learned:
    engine: Engine
    forwards: Sequence[Forward]
    num_learned_tokens: int

    def share(self, number: int) -> torch.Tensor:
        return forward_loss(self.engine, self.forwards[number]) / self.num_learned_tokens

    def told(self) -> dict[str, float]:
        return {}


IMITATION: Objective = Imitation()


def whole(engine: Engine, rows: Sequence[Row], *, objective: Objective) -> Share:
    """Return the share of a process that computes all of a step."""
    return objective.settle(engine, Share(objective.measure(rows)), total=list)


def train_step(
    engine: Engine,
    forwards: Sequence[Forward],
    *,
    seeds: tuple[int, int],
    backward: Callable[[torch.Tensor], None],
    objective: Objective = IMITATION,
    share: Share = WHOLE,
) -> StepResult:
    """Add the gradient of one optimizer step, or of a rank's share of it, to the parameters.

    `seeds`: (run seed, step), for dropout.

    Raises: ValueError if nothing is learned in the step; the preflight lets no such row through.
    """
    if share.measure is None and not _num_learned(forwards):
        raise ValueError(f"step {seeds[1]} holds no learned token")
    loss_sum = 0.0
    aim = objective.aim(engine, forwards, share=share)
    with running(engine):
        for number in range(len(forwards)):
            torch.manual_seed(dropout_seed(*seeds, forward=number * share.num_ranks + share.rank))
            loss = aim.share(number)
            backward(loss)
            loss_sum += loss.item()
    num_tokens = sum(forward.num_tokens for forward in forwards)
    return StepResult(loss_sum, _num_learned(forwards), num_tokens, aim.told())


@torch.no_grad()  # type: ignore[untyped-decorator]
def held_out(
    engine: Engine, forwards: Sequence[Forward], *, objective: Objective = IMITATION, share: Share = WHOLE
) -> dict[str, float]:
    """Return an objective's loss without dropout, and what it tells, as "eval_NAME"; the model's mode is restored.

    Of a share: what it adds to each.
    """
    aim = objective.aim(engine, forwards, share=share)
    with evaluating(engine.model), running(engine):
        loss: float = sum(aim.share(number).item() for number in range(len(forwards)))
    return {"eval_loss": float(loss), **{f"eval_{name}": value for name, value in aim.told().items()}}


def held_out_loss(engine: Engine, pairs: Sequence[Pair]) -> float:
    """Return the mean loss (nats a learned token) of `pairs` without dropout."""
    return float(held_out(engine, make_forwards(engine, pairs))["eval_loss"])


def _num_learned(forwards: Sequence[Forward]) -> int:
    return sum(int(forward.weights_E.sum()) for forward in forwards)


def dropout_seed(seed: int, step: int, *, forward: int) -> int:
    """Return the seed of one forward: a function of its place in the run, so that no RNG state is ever saved."""
    return int(np.random.SeedSequence([seed, step, forward]).generate_state(1, np.uint64)[0] >> 1)
