"""What is measured on rows that were not trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from truetune.engine.step import Engine, held_out_loss
from truetune.records import Row, pairs_of

MAX_SHARE = 0.05
"""Evaluations take about this share of a run's time at most, unless the user says otherwise."""

STEP_COST = 2.2
"""Time of a training step over that of its forward alone: LoRA's backward skips the frozen weights' gradient."""

MAX_EVALUATIONS = 10
MIN_ROWS = 8


def loss_evaluator(engine: Engine, rows: Sequence[Row]) -> Callable[[], float | None]:
    """Return a function that gives the model's loss on `rows` as it is now, or None if there are none."""
    pairs = pairs_of(rows)
    if not pairs:
        return lambda: None
    return lambda: held_out_loss(engine, pairs)


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
