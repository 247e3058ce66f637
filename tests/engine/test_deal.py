"""Pairs dealt to ranks: nothing lost, as even as a cut of the sorted pairs can be, prefixes together."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from truetune.engine.compare import use_kind
from truetune.engine.deal import deal, filled
from truetune.engine.objective import Share, train_step
from truetune.engine.step import Engine, make_forwards
from truetune.engine.trie import build_trie
from truetune.model import add_lora
from truetune.records import Pair


def tokens_of(pairs: list[Pair], *, is_shared: bool) -> int:
    """Tokens that a rank reads."""
    if not pairs:
        return 0
    return len(build_trie(pairs)) if is_shared else sum(len(pair) - 1 for pair in pairs)


def some_pairs(seed: int, number: int) -> list[Pair]:
    """Pairs below a few common prefixes; some are the same."""
    draw = random.Random(seed)
    prefixes = [tuple(draw.choices(range(3), k=draw.randint(1, 6))) for _ in range(3)]
    return [
        Pair(draw.choice(prefixes) + tuple(draw.choices(range(3), k=draw.randint(0, 3))), (1, 2)[: draw.randint(1, 2)])
        for _ in range(number)
    ]


def best(pairs: list[Pair], num_ranks: int, *, is_shared: bool) -> int:
    """The least of the most tokens over every cut of the sorted pairs."""
    ordered = sorted(pairs, key=lambda p: p.prompt_ids + p.answer_ids) if is_shared else sorted(pairs, key=len)
    cuts = itertools.combinations_with_replacement(range(len(ordered) + 1), num_ranks - 1)
    return min(
        max(
            tokens_of(ordered[a:b], is_shared=is_shared) for a, b in itertools.pairwise((0, *sorted(cut), len(ordered)))
        )
        for cut in cuts
    )


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_pair_once_and_as_even_as_can_be(num_ranks: int, is_shared: bool) -> None:
    num_cases = 0
    for seed in range(25):
        pairs = some_pairs(seed, 1 + seed % 8)
        dealt = deal(pairs, num_ranks, is_shared=is_shared)
        assert len(dealt) == num_ranks
        assert Counter(pair for own in dealt for pair in own) == Counter(pairs)
        most = max(tokens_of(own, is_shared=is_shared) for own in dealt)
        assert num_ranks == 1 or most == best(pairs, num_ranks, is_shared=is_shared)
        num_cases += 1
    assert num_cases == 25


def test_one_rank_keeps_the_order() -> None:
    """So that a process alone computes what it always did."""
    pairs = some_pairs(0, 9)
    assert deal(pairs, 1, is_shared=True) == [pairs]


def test_the_order_of_the_rows_does_not_matter() -> None:
    pairs = some_pairs(1, 12)
    assert deal(pairs, 3, is_shared=True) == deal(pairs[::-1], 3, is_shared=True)


def test_more_ranks_than_pairs() -> None:
    dealt = deal([Pair((1, 2), (3,)), Pair((4, 5), (6,))], 4, is_shared=True)
    assert sorted(map(len, dealt)) == [0, 0, 1, 1]


def test_nothing_to_deal() -> None:
    assert deal([], 2, is_shared=True) == [[], []]


def test_a_shared_prompt_stays_on_one_rank() -> None:
    """Two families of equal size: each rank gets one of them, and no prompt is read twice."""
    pairs = [Pair((family, *range(50)), (answer,)) for answer in range(100, 104) for family in (1, 2)]
    dealt = deal(pairs, 2, is_shared=True)
    assert [{pair.prompt_ids[0] for pair in own} for own in dealt] == [{1}, {2}]


def test_empty_forwards_add_nothing(tiny_qwen: Path) -> None:
    """A rank that runs more forwards than it has comes to the same loss and gradient, by every kind."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny_qwen), dtype=torch.float32)
    model = add_lora(model, r=4, alpha=8, dropout=0.0, targets=["all-linear"], seed=1).train()
    pairs = some_pairs(3, 5)
    num_cases = 0
    for kind in ("trie", "padded", "plain"):
        engine = use_kind(Engine(model, kind, 0, 64))  # type: ignore[arg-type]
        found = []
        for num_forwards in (1, 3):
            forwards = filled(engine, make_forwards(engine, pairs), num_forwards=num_forwards)
            assert len(forwards) == num_forwards
            share = Share(sum(len(pair.answer_ids) for pair in pairs))
            result = train_step(engine, forwards, seeds=(0, 1), backward=lambda loss: loss.backward(), share=share)
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            found.append((result.loss, gradient))
            model.zero_grad(set_to_none=True)
            num_cases += 1
        assert found[0][0] == found[1][0]
        assert torch.equal(found[0][1], found[1][1])
    assert num_cases == 6
    assert len(filled(engine, [], num_forwards=2)) == 2
