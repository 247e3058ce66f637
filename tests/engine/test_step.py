"""One step: padded rows, tries and the model's own code, against rows computed one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truetune.engine import step as step_module
from truetune.engine.step import (
    Engine,
    Share,
    dropout_seed,
    forward_loss,
    held_out_loss,
    make_forwards,
    running,
    scaled_from,
    split_padded,
    train_step,
)
from truetune.model import Base, add_lora, load_base
from truetune.records import Pair

PAIRS = [Pair((1, 2, 3), (4, 2)), Pair((5,), (6, 7, 8, 2)), Pair((1, 2, 3, 4, 5, 6), (2,)), Pair((9, 9), (9, 9, 2))]
KINDS = ("trie", "padded", "plain")


@pytest.fixture(scope="module")
def model(tiny_qwen: Path) -> Any:
    """The tiny random model with LoRA that does something, no dropout."""
    base = load_base(Base(str(tiny_qwen), tiny_qwen, ""), "float32")
    model = add_lora(base, r=4, alpha=8, dropout=0.0, targets=["all-linear"], seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


@pytest.fixture
def engine(model: Any) -> Engine:
    """One forward for everything."""
    return Engine(model, "trie", pad_id=2, max_tokens=10_000)


def loss_alone(model: Any, pair: Pair) -> torch.Tensor:
    """The summed loss of one pair by transformers' own loss: no padding, labels of -100, mean times count."""
    ids = torch.tensor([pair.prompt_ids + pair.answer_ids])
    labels = ids.clone()
    labels[0, : len(pair.prompt_ids)] = -100
    return model(input_ids=ids, labels=labels).loss * len(pair.answer_ids)


def gradient(model: Any) -> torch.Tensor:
    """All gradients in one vector; they are cleared."""
    parts = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    return torch.cat(parts)


def test_padded_forward_by_hand(engine: Engine) -> None:
    """The stop token is predicted, never read; what is learned hangs on the token before it, also where it equals
    the padding token."""
    pairs = [Pair((1, 2, 3), (4, 2)), Pair((5,), (6, 2))]
    (forward,) = make_forwards(replace(engine, kind="padded"), pairs)
    assert forward.input_ids_BT.tolist() == [[5, 6, 2, 2], [1, 2, 3, 4]]
    edges = zip(forward.parents_E.tolist(), forward.targets_E.tolist(), forward.weights_E.tolist(), strict=True)
    assert list(edges) == [(0, 6, 1), (1, 2, 1), (6, 4, 1), (7, 2, 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_tokens", [1, 8, 10_000])
def test_every_kind_equals_single_rows(kind: Any, max_tokens: int, engine: Engine) -> None:
    """Loss and gradient of a step are the mean over its learned tokens, however it is computed and split."""
    (sum(loss_alone(engine.model, pair) for pair in PAIRS) / 10).backward()
    wanted = gradient(engine.model)
    mean = sum(loss_alone(engine.model, pair).item() for pair in PAIRS) / 10
    engine = replace(engine, kind=kind, max_tokens=max_tokens)
    forwards = make_forwards(engine, PAIRS)
    assert (len(forwards) > 1) == (max_tokens < 100)
    result = train_step(engine, forwards, seeds=(1, 1), backward=lambda loss: loss.backward())
    found = gradient(engine.model)
    assert result.loss == pytest.approx(mean, rel=1e-5)
    assert result.num_learned_tokens == 10
    assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm())


def test_tokens_are_counted(engine: Engine) -> None:
    """A trie has no padding, and what two pairs share counts once."""
    for kind, expected in (("trie", 1 + 2 + 1 + 4 + 6 - 0), ("padded", 4 * 6)):
        forwards = make_forwards(replace(engine, kind=kind), PAIRS)
        result = train_step(replace(engine, kind=kind), forwards, seeds=(1, 1), backward=lambda loss: None)
        assert result.num_tokens == expected, kind


def test_padding_token_does_not_matter(engine: Engine) -> None:
    """Whatever fills a row, the loss is the same bits: nothing looks right."""
    losses = []
    for pad_id in (0, 77):
        padded = replace(engine, kind="padded", pad_id=pad_id)
        losses.append(forward_loss(padded, make_forwards(padded, PAIRS)[0]).item())
    assert losses[0] == losses[1]


def test_step_without_learned_tokens_is_an_error(engine: Engine) -> None:
    """The preflight lets none through; if one came, 0/0 would be silent."""
    (forward,) = make_forwards(engine, PAIRS)
    with pytest.raises(ValueError, match="learned"):
        train_step(
            engine, [replace(forward, weights_E=forward.weights_E * 0)], seeds=(1, 1), backward=lambda loss: None
        )


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_loss_is_the_mean_and_restores_the_mode(kind: Any, engine: Engine) -> None:
    """Any split gives the mean over learned tokens; a model in training stays in training."""
    mean = sum(loss_alone(engine.model, pair).item() for pair in PAIRS) / sum(len(pair.answer_ids) for pair in PAIRS)
    for max_tokens in (1, 10, 100):
        found = held_out_loss(replace(engine, kind=kind, max_tokens=max_tokens), PAIRS)
        assert found == pytest.approx(mean, rel=1e-5)
    assert engine.model.training


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(1, 100), st.integers(5, 60))
def test_padded_forwards_hold_every_pair_once(lengths: list[int], max_tokens: int, scaled: int) -> None:
    """No pair is lost; only a pair that is longer alone makes a forward too large; scaled lengths stay alone."""
    pairs = [Pair((n,), tuple(range(length - 1))) for n, length in enumerate(lengths)]
    forwards = split_padded(pairs, max_tokens, scaled_from=scaled)
    assert sorted(pair.prompt_ids for forward in forwards for pair in forward) == sorted(p.prompt_ids for p in pairs)
    for forward in forwards:
        assert len(forward) == 1 or len(forward) * (max(map(len, forward)) - 1) <= max_tokens
        assert len(forward) == 1 or max(map(len, forward)) - 1 <= scaled


def test_rotary_scaling_that_looks_at_the_whole_forward() -> None:
    """Dynamic and longrope give a threshold, the others none."""
    from transformers import LlamaConfig, Phi3Config

    assert scaled_from(LlamaConfig()) is None
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert scaled_from(LlamaConfig(max_position_embeddings=64, rope_parameters=dynamic)) == 64
    factors = [1.0] * 4
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    config = Phi3Config(
        hidden_size=32,
        num_attention_heads=4,
        pad_token_id=0,
        original_max_position_embeddings=48,
        max_position_embeddings=96,
        rope_parameters=longrope | {"original_max_position_embeddings": 48},
    )
    assert scaled_from(config) == 48


def test_dropout_seeds_differ() -> None:
    """Every (seed, step, forward) has a seed of its own."""
    seeds = {dropout_seed(a, b, forward=c) for a in range(5) for b in range(20) for c in range(5)}
    assert len(seeds) == 500


def test_every_forward_of_every_rank_has_a_seed_of_its_own(
    engine: Engine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And rank 0 of one has those of a process alone."""
    drawn: list[int] = []
    monkeypatch.setattr(step_module, "dropout_seed", lambda *_, forward: drawn.append(forward) or 0)
    forwards = make_forwards(replace(engine, max_tokens=4), PAIRS)
    assert len(forwards) >= 2
    for share in (Share(), *(Share(99, rank, 3) for rank in range(3))):
        train_step(engine, forwards, seeds=(0, 1), backward=lambda _: None, share=share)
    num = len(forwards)
    assert drawn[:num] == list(range(num))
    assert sorted(drawn[num:]) == list(range(3 * num))


def test_evaluation_is_without_dropout(tiny_qwen: Path) -> None:
    """Twice the same, although the model is in training and its dropout is heavy (E10)."""
    base = load_base(Base(str(tiny_qwen), tiny_qwen, ""), "float32")
    lora = add_lora(base, r=4, alpha=8, dropout=0.5, targets=["all-linear"], seed=0).train()
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    engine = Engine(lora, "trie", 0, 100)
    losses = [held_out_loss(engine, PAIRS) for _ in range(2)]
    assert losses[0] == losses[1]
    with running(engine):
        drawn = [forward_loss(engine, make_forwards(engine, PAIRS)[0]).item() for _ in range(2)]
    assert drawn[0] != drawn[1]
