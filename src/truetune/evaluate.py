"""What is measured on rows: loss, perplexity, token accuracy; how many rows, and how often, a run can afford."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from truetune.engine.deal import filled
from truetune.engine.objective import IMITATION, Objective, Share, held_out
from truetune.engine.score import Score, score
from truetune.engine.step import Engine
from truetune.ranks import ALONE, Ranks, watched
from truetune.records import Pair, Row, pairs_of

MAX_SHARE = 0.03
"""Evaluations take about this share of a run's time at most, unless the user says otherwise; with samples and report
it is 5 %."""

STEP_COST = 2.2
"""Time of a training step over that of its forward alone: LoRA's backward skips the frozen weights' gradient."""

MAX_EVALUATIONS = 10
MIN_ROWS = 8


@dataclass(frozen=True)
class Metrics:
    """What a model makes of rows. Losses are means in nats a token; shares are between 0 and 1.

    `loss`: over all learned tokens. `answer_loss`: over those that the rows gave; `template_loss`: over those that the
    template wrote, which flatter the loss. `token_accuracy`: the rows' tokens that were the likeliest.
    `stop_accuracy`: the ends of answers where stopping was the likeliest.
    """

    loss: float
    answer_loss: float
    template_loss: float
    token_accuracy: float
    stop_accuracy: float
    num_rows: int
    num_tokens: int
    num_template_tokens: int

    @property
    def perplexity(self) -> float:
        """Of the answers: among how many equally likely tokens the model would be choosing."""
        return math.exp(min(self.answer_loss, MAX_EXPONENT))

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self) | {"perplexity": self.perplexity}


MAX_EXPONENT = 700.0
"""e to more than this is no float."""


def is_template(pair: Pair) -> np.ndarray:
    """Return which of a pair's `answer_ids` the template wrote [A]: the stop token, and what it puts before an answer.

    <think> \\n\\n </think> \\n\\n  I  am  Ebba  <|im_end|>          num_template_tokens = 5
       1     1      1     1    0   0    0        1
    """
    is_template_A = np.zeros(len(pair.answer_ids), bool)
    # A piece of a text that goes on has none, and no end.
    is_template_A[: max(pair.num_template_tokens - 1, 0)] = True
    is_template_A[-1] = pair.num_template_tokens > 0
    return is_template_A


def row_losses(rows: Sequence[Row], scores: Sequence[Score]) -> list[float]:
    """Return each row's mean loss over its answers' own tokens; `scores`: of the rows' pairs."""
    ends = np.cumsum([len(row.pairs) for row in rows])
    masks = [~is_template(pair) for pair in pairs_of(rows)]
    losses = []
    for row, end in zip(rows, ends, strict=True):
        start = end - len(row.pairs)
        own = [score.losses_A[mask] for score, mask in zip(scores[start:end], masks[start:end], strict=True)]
        losses.append(_mean(np.concatenate(own)))
    return losses


def rate(rows: Sequence[Row], scores: Sequence[Score]) -> Metrics:
    """Return what the scores of the rows' pairs say together."""
    masks = [is_template(pair) for pair in pairs_of(rows)]
    is_template_E = np.concatenate(masks)
    ended = [score for pair, score in zip(pairs_of(rows), scores, strict=True) if pair.num_template_tokens]
    losses_E = np.concatenate([score.losses_A for score in scores])
    is_likeliest_E = np.concatenate([score.is_likeliest_A for score in scores])
    return Metrics(
        loss=_mean(losses_E),
        answer_loss=_mean(losses_E[~is_template_E]),
        template_loss=_mean(losses_E[is_template_E]),
        token_accuracy=_mean(is_likeliest_E[~is_template_E]),
        stop_accuracy=_mean(np.array([score.is_likeliest_A[-1] for score in ended])),
        num_rows=len(rows),
        num_tokens=len(losses_E),
        num_template_tokens=int(is_template_E.sum()),
    )


def measure(engine: Engine, rows: Sequence[Row]) -> Metrics:
    """Return the metrics of the engine's model, as it is now, on `rows`."""
    return rate(rows, score(engine, pairs_of(rows)))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def loss_evaluator(
    engine: Engine, rows: Sequence[Row], *, ranks: Ranks = ALONE, objective: Objective = IMITATION
) -> Callable[[], Mapping[str, float] | None]:
    """Return a function that gives the model's loss on `rows` as it is now, or None if there are none.

    As `eval_loss`, with what the objective tells beside it: `eval_reward_accuracy` and others. Each of `ranks` computes
    a part.
    """
    if not rows:
        return lambda: None
    measured = Share(objective.measure(rows), ranks.rank, ranks.size)

    def evaluate() -> dict[str, float]:
        share = objective.settle(engine, measured, total=ranks.sum)
        forwards = objective.forwards(engine, rows, share=share)
        if engine.is_sharded:
            forwards = filled(engine, forwards, num_forwards=int(ranks.most(len(forwards))))
        with watched():
            part = held_out(engine, forwards, objective=objective, share=share)
        return dict(zip(part, ranks.sum(list(part.values())), strict=True))

    return evaluate


def limit_rows(rows: Sequence[Row], num_trained_rows: int) -> Sequence[Row]:
    """Return as many held-out rows as two evaluations of a short run can afford, at least MIN_ROWS.

    `num_trained_rows`: rows that all steps of the run train, repeats counted.
    """
    affordable = int(MAX_SHARE * STEP_COST * num_trained_rows / 2)
    return rows[: max(affordable, MIN_ROWS)]


def choose_eval_steps(num_steps: int, *, num_trained_rows: int, num_rows: int) -> int:
    """Return the steps between evaluations: as many as MAX_SHARE pays for, 1 to MAX_EVALUATIONS in a run."""
    if num_rows == 0:
        return num_steps
    affordable = int(MAX_SHARE * STEP_COST * num_trained_rows / num_rows)
    num_evaluations = min(max(affordable - 1, 1), MAX_EVALUATIONS, num_steps)
    return -(-num_steps // num_evaluations)
