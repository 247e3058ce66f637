"""How far two models are apart: by hand, and of what is the same or is not a number."""

from __future__ import annotations

import math

import pytest
import torch

from truetune.drift import MAX_TOKENS, answer_logits, chosen, compare
from truetune.records import Pair


def test_what_is_the_same_is_not_apart() -> None:
    logits = [torch.randn(3, 5), torch.randn(2, 5)]
    drift = compare(logits, [part.clone() for part in logits])
    assert (drift.num_pairs, drift.num_tokens, drift.kl, drift.same_best) == (2, 5, 0.0, 1.0)
    assert (drift.largest, drift.gap) == (0.0, 0.0)


def test_against_numbers_by_hand() -> None:
    """Two tokens of two words: p = (3/4, 1/4) against q = (1/4, 3/4), and the same twice."""
    ours = torch.tensor([[math.log(3.0), 0.0], [1.0, 0.0]])
    theirs = torch.tensor([[0.0, math.log(3.0)], [1.0, 0.0]])
    drift = compare([ours], [theirs])
    assert drift.kl == pytest.approx(0.5 * math.log(3.0) / 2, rel=1e-6)
    assert drift.same_best == 0.5
    assert drift.largest == pytest.approx(math.log(3.0))
    assert drift.gap == pytest.approx(math.log(3.0))


def test_not_a_number_is_infinitely_far() -> None:
    drift = compare([torch.zeros(1, 4)], [torch.full((1, 4), torch.nan)])
    assert drift.kl == math.inf
    assert drift.largest == math.inf


def test_the_logits_that_predict_the_answer() -> None:
    """Position t of the stand-in says t; the answer (5, 6) behind a prompt of three is predicted at 2 and 3."""
    pair = Pair((1, 2, 3), (5, 6))
    (found,) = answer_logits([pair], of=lambda ids: torch.arange(len(ids)).float()[:, None])
    assert found.flatten().tolist() == [2.0, 3.0]


def test_few_enough_to_fit() -> None:
    pairs = [Pair((1,), (2,) * 100)] * 20
    assert len(chosen(pairs)) == MAX_TOKENS // 100
    assert len(chosen([Pair((1,), (2,) * 10_000)])) == 1
