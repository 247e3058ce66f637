"""Padding, masks and losses of one step, against rows computed one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truetune.engine.step import collate, dropout_seed, forward_loss, held_out_loss, split_forwards, train_step
from truetune.model import Base, add_lora, load_base
from truetune.records import IGNORE_INDEX, Pair

PAIRS = [Pair((1, 2, 3), (4, 2)), Pair((5,), (6, 7, 8, 2)), Pair((1, 2, 3, 4, 5, 6), (2,)), Pair((9, 9), (9, 9, 2))]


@pytest.fixture(scope="module")
def model(tiny_qwen: Path) -> Any:
    """The tiny random model, all weights trainable, no dropout."""
    return load_base(Base(str(tiny_qwen), tiny_qwen, ""), "float32").eval()


def loss_alone(model: Any, pair: Pair) -> torch.Tensor:
    """The summed loss of one pair by transformers' own loss: no padding, labels of -100, mean times count."""
    ids = torch.tensor([pair.prompt_ids + pair.answer_ids])
    labels = ids.clone()
    labels[0, : len(pair.prompt_ids)] = -100
    return model(input_ids=ids, labels=labels).loss * len(pair.answer_ids)


def test_collate_by_hand() -> None:
    """Labels stand on the answer, the stop token included, also where it equals the padding token."""
    ids, labels = collate([Pair((1, 2, 3), (4, 2)), Pair((5,), (6, 2))], pad_id=2)
    assert ids.tolist() == [[1, 2, 3, 4, 2], [5, 6, 2, 2, 2]]
    x = IGNORE_INDEX
    assert labels.tolist() == [[x, x, x, 4, 2], [x, 6, 2, x, x]]


def test_padded_rows_equal_single_rows(model: Any) -> None:
    """Loss and gradient of a padded forward are the sums over its pairs alone."""
    together = forward_loss(model, PAIRS, pad_id=2)
    alone = sum(loss_alone(model, pair) for pair in PAIRS)
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for one, other in zip(
        torch.autograd.grad(together, parameters), torch.autograd.grad(alone, parameters), strict=True
    ):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm())
    assert len(parameters) > 20


def test_padding_token_does_not_matter(model: Any) -> None:
    """Whatever fills a row, the loss is the same bits: nothing looks right."""
    assert forward_loss(model, PAIRS, pad_id=0).item() == forward_loss(model, PAIRS, pad_id=77).item()


def test_held_out_loss_is_the_mean_and_restores_the_mode(model: Any) -> None:
    """Any split gives the mean over learned tokens; a model in training stays in training."""
    mean = sum(loss_alone(model, pair).item() for pair in PAIRS) / sum(len(pair.answer_ids) for pair in PAIRS)
    model.train()
    for max_tokens in (1, 10, 100):
        assert held_out_loss(model, PAIRS, max_tokens=max_tokens, pad_id=0) == pytest.approx(mean, rel=1e-5)
    assert model.training
    model.eval()


def test_step_divides_by_the_tokens_of_the_step(model: Any) -> None:
    """The gradient is that of the mean over all learned tokens, not of the mean of means."""
    wanted = sum(loss_alone(model, pair) for pair in PAIRS) / sum(len(pair.answer_ids) for pair in PAIRS)
    weight = model.model.layers[0].mlp.down_proj.weight
    (gradient,) = torch.autograd.grad(wanted, [weight])
    for max_tokens in (1, 8, 100):
        model.zero_grad()
        result = train_step(
            model, PAIRS, max_tokens=max_tokens, pad_id=0, seeds=(1, 1), backward=lambda loss: loss.backward()
        )
        assert result.loss == pytest.approx(wanted.item(), rel=1e-5)
        assert float((weight.grad - gradient).norm()) <= 1e-5 * float(gradient.norm())
        assert result.num_learned_tokens == 10


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(1, 100))
def test_forwards_hold_every_pair_once(lengths: list[int], max_tokens: int) -> None:
    """No pair is lost, and only a pair that is longer alone makes a forward too large."""
    pairs = [Pair((n,), tuple(range(length - 1))) for n, length in enumerate(lengths)]
    forwards = split_forwards(pairs, max_tokens)
    assert sorted(pair.prompt_ids for forward in forwards for pair in forward) == sorted(p.prompt_ids for p in pairs)
    for forward in forwards:
        assert len(forward) == 1 or len(forward) * max(map(len, forward)) <= max_tokens


def test_dropout_seeds_differ() -> None:
    """Every (seed, step, forward) has a seed of its own."""
    seeds = {dropout_seed(a, b, forward=c) for a in range(5) for b in range(20) for c in range(5)}
    assert len(seeds) == 500


def test_evaluation_is_without_dropout(tiny_qwen: Path) -> None:
    """Twice the same, although the model is in training and its dropout is heavy (E10)."""
    lora = add_lora(
        load_base(Base(str(tiny_qwen), tiny_qwen, ""), "float32"),
        r=4,
        alpha=8,
        dropout=0.5,
        targets=["all-linear"],
        seed=0,
    ).train()
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    losses = [held_out_loss(lora, PAIRS, max_tokens=100, pad_id=0) for _ in range(2)]
    assert losses[0] == losses[1]
    drawn = [forward_loss(lora, PAIRS, pad_id=0).item() for _ in range(2)]
    assert drawn[0] != drawn[1]
