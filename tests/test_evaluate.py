"""How many held-out rows are evaluated, and how often: about 3 % of a run's time at most."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from truetune.engine.score import Score
from truetune.engine.step import Engine
from truetune.evaluate import (
    MAX_EVALUATIONS,
    MAX_SHARE,
    MIN_ROWS,
    STEP_COST,
    choose_eval_steps,
    is_template,
    limit_rows,
    loss_evaluator,
    rate,
    row_losses,
)
from truetune.records import Pair, Row

ROWS = [Row(number, f"a.json:{number}", (Pair((1, 2), (3,)),)) for number in range(500)]


def share(num_rows: int, num_evaluations: int, num_trained_rows: int) -> float:
    """Time of the evaluations over that of the training steps: a step costs STEP_COST forwards."""
    return num_evaluations * num_rows / (STEP_COST * num_trained_rows)


def num_evaluations(num_steps: int, every: int) -> int:
    """Evaluations of a run: one before it, one every so many steps, one at the end."""
    return 1 + -(-num_steps // every)


def test_the_constants_are_those_of_the_product() -> None:
    assert (MAX_SHARE, MAX_EVALUATIONS, MIN_ROWS) == (0.03, 10, 8)


@pytest.mark.parametrize(
    ("num_held_out", "num_trained_rows", "expected"),
    [
        (0, 1000, 0),
        (5, 10, 5),
        (8, 10, 8),
        (20, 10, 8),
        (500, 100, 8),
        (500, 1000, 33),
        (30, 1000, 30),
        (500, 100_000, 500),
    ],
)
def test_a_short_run_evaluates_fewer_rows(num_held_out: int, num_trained_rows: int, expected: int) -> None:
    limited = limit_rows(ROWS[:num_held_out], num_trained_rows)
    assert list(limited) == ROWS[:expected]


@pytest.mark.parametrize("num_trained_rows", [1, 100, 146, 500, 1000, 3729, 11_187, 1_000_000])
def test_two_evaluations_of_the_limited_rows_stay_within_the_share(num_trained_rows: int) -> None:
    num_rows = len(limit_rows(ROWS, num_trained_rows))
    assert share(num_rows, 2, num_trained_rows) <= MAX_SHARE or num_rows == MIN_ROWS


@pytest.mark.parametrize(
    ("num_steps", "num_trained_rows", "num_rows", "expected"),
    [
        # Nothing is held out.
        (100, 1600, 0, 100),
        (1, 16, 0, 1),
        # A tiny run: once, at its end.
        (1, 8, 8, 1),
        (3, 48, 8, 3),
        (10, 80, 8, 10),
        # A long run: ten times.
        (351, 11_187, 40, 36),
        (1000, 16_000, 90, 100),
        (100_000, 1_600_000, 500, 10_000),
        # In between: as often as it pays for.
        (100, 1600, 20, 25),
    ],
)
def test_steps_between_evaluations(num_steps: int, num_trained_rows: int, num_rows: int, expected: int) -> None:
    assert choose_eval_steps(num_steps, num_trained_rows=num_trained_rows, num_rows=num_rows) == expected


CASES = list(product((1, 2, 7, 30, 100, 351, 999, 5000), (1, 8, 16, 64), (1, 8, 40, 500)))


@pytest.mark.parametrize(("num_steps", "batch_size", "num_held_out"), CASES)
def test_evaluations_stay_within_their_share(num_steps: int, batch_size: int, num_held_out: int) -> None:
    num_trained_rows = num_steps * batch_size
    num_rows = len(limit_rows(ROWS[:num_held_out], num_trained_rows))
    every = choose_eval_steps(num_steps, num_trained_rows=num_trained_rows, num_rows=num_rows)
    assert 1 <= every <= num_steps
    count = num_evaluations(num_steps, every)
    assert 2 <= count <= MAX_EVALUATIONS + 1
    # A run too short for two evaluations of MIN_ROWS still gets them.
    least = share(num_rows, 2, num_trained_rows)
    assert share(num_rows, count, num_trained_rows) <= max(MAX_SHARE, least)
    assert least <= MAX_SHARE or num_rows <= MIN_ROWS


def test_many_cases_pay_for_more_than_two_evaluations() -> None:
    assert len(CASES) == 128
    counts = []
    for num_steps, batch_size, num_held_out in CASES:
        num_rows = len(limit_rows(ROWS[:num_held_out], num_steps * batch_size))
        counts.append(
            num_evaluations(
                num_steps, choose_eval_steps(num_steps, num_trained_rows=num_steps * batch_size, num_rows=num_rows)
            )
        )
    assert sum(count > 2 for count in counts) > 40
    assert max(counts) == MAX_EVALUATIONS + 1


def test_without_rows_there_is_no_loss() -> None:
    assert loss_evaluator(Engine(None, "trie", 0, 10), [])() is None


def test_what_the_template_wrote_is_counted_apart() -> None:
    """By hand: a pair with a think block of two tokens and a stop, one with a stop alone, in one row and in two."""
    with_block = Pair((1, 2), (8, 9, 5, 6, 2), num_template_tokens=3)
    plain = Pair((1,), (7, 2))
    assert is_template(with_block).tolist() == [True, True, False, False, True]
    assert is_template(plain).tolist() == [False, True]
    scores = [
        Score(np.array([0.1, 0.2, 4.0, 2.0, 0.3]), np.array([True, True, False, True, False])),
        Score(np.array([3.0, 0.4]), np.array([True, True])),
    ]
    for rows in ([Row(0, "a", (with_block, plain))], [Row(0, "a", (with_block,)), Row(1, "b", (plain,))]):
        found = rate(rows, scores)
        assert found.answer_loss == pytest.approx(3.0)
        assert found.template_loss == pytest.approx(0.25)
        assert found.loss == pytest.approx(10 / 7)
        assert found.perplexity == pytest.approx(math.e**3)
        assert found.token_accuracy == pytest.approx(2 / 3)
        assert found.stop_accuracy == 0.5
        assert (found.num_rows, found.num_tokens, found.num_template_tokens) == (len(rows), 7, 4)
    assert row_losses([Row(0, "a", (with_block,)), Row(1, "b", (plain,))], scores) == pytest.approx([3.0, 3.0])
    assert row_losses([Row(0, "a", (with_block, plain))], scores) == pytest.approx([3.0])


def test_a_loss_too_large_for_e_is_still_a_perplexity() -> None:
    scores = [Score(np.array([5000.0, 1.0]), np.array([False, False]))]
    assert math.isfinite(rate([Row(0, "a", (Pair((1,), (7, 2)),))], scores).perplexity)
