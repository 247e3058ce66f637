"""Tokens are drawn with the probabilities that softmax, temperature and top_p give them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from truetune.serve import sampler
from truetune.serve.sampler import Draw, pick, score

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -9.0]])


def shares(draw: Draw, count: int = 4000) -> list[float]:
    found = Counter(pick(LOGITS, [draw])[0] for _ in range(count))
    return [found[token] / count for token in range(LOGITS.shape[1])]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    wanted = (LOGITS[0] / temperature).softmax(0)
    assert shares(Draw(temperature=temperature, seed=1)) == pytest.approx(wanted.tolist(), abs=0.03)


@pytest.mark.parametrize(("top_p", "num_kept"), [(0.01, 1), (0.6, 1), (0.7, 2), (0.9, 3), (0.98, 4)])
@pytest.mark.parametrize("num_likeliest", [2, 256])
def test_top_p_keeps_the_fewest_that_reach_it(
    top_p: float, num_kept: int, num_likeliest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the tokens sorted first are too few."""
    monkeypatch.setattr(sampler, "NUM_LIKELIEST", num_likeliest)
    kept = LOGITS[0].softmax(0)[:num_kept]
    wanted = [*(kept / kept.sum()).tolist(), *[0.0] * (5 - num_kept)]
    assert shares(Draw(temperature=1.0, top_p=top_p, seed=2)) == pytest.approx(wanted, abs=0.03)


def test_rows_are_independent_and_seeds_repeat() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))

    def run(rows: list[int], seed: int) -> list[list[int]]:
        draws = [Draw(temperature=0.0 if row == 1 else 1.0, seed=seed + row) for row in rows]
        return [pick(logits[rows], draws) for _ in range(20)]

    whole, part = run([0, 1, 2, 3], 5), run([2, 1], 5)
    assert [[step[2], step[1]] for step in whole] == part
    assert {step[1] for step in whole} == {int(logits[1].argmax())}
    assert run([0, 2], 6) != run([0, 2], 5)
    assert pick(logits, [Draw(temperature=1.0), *[Draw()] * 3])[1:] == logits[1:].argmax(-1).tolist()


def test_scores_are_log_probabilities() -> None:
    found = score(LOGITS[0], 3, num_likeliest=2)
    logprobs = LOGITS[0].log_softmax(0).tolist()
    assert found.logprob == pytest.approx(logprobs[3])
    assert [token for token, _ in found.likeliest] == [0, 1]
    assert [value for _, value in found.likeliest] == pytest.approx(logprobs[:2])
    assert score(LOGITS[0], 3, num_likeliest=0).likeliest == ()
