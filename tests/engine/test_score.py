"""Every learned token's loss: from tries, padded rows and the model's own code, against rows computed one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from truetune.engine.objective import held_out_loss
from truetune.engine.score import mean_loss, score
from truetune.engine.step import Engine
from truetune.model import Base, add_lora, load_base
from truetune.records import Pair

PAIRS = [
    Pair((1, 2, 3), (4, 2)),
    Pair((5,), (6, 7, 8, 2)),
    Pair((1, 2, 3, 4, 5, 6), (2,)),
    Pair((1, 2, 3), (4, 9, 2)),
    Pair((1, 2, 3), (4, 2)),
    Pair((9, 9), (9, 9, 2)),
]


@pytest.fixture(scope="module")
def model(tiny_qwen: Path) -> Any:
    """The tiny random model with LoRA that does something, and dropout that must not."""
    base = load_base(Base(str(tiny_qwen), tiny_qwen, ""), "float32")
    model = add_lora(base, r=4, alpha=8, dropout=0.5, targets=["all-linear"], seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def alone(model: Any, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Losses and likeliest tokens of one pair by transformers itself."""
    model.eval()
    with torch.no_grad():
        logits_AV = model(input_ids=torch.tensor([pair.prompt_ids + pair.answer_ids])).logits[
            0, len(pair.prompt_ids) - 1 : -1
        ]
    model.train()
    targets = torch.tensor(pair.answer_ids)
    return F.cross_entropy(logits_AV, targets, reduction="none").numpy(), (logits_AV.argmax(-1) == targets).numpy()


@pytest.mark.parametrize("kind", ["trie", "padded", "plain"])
@pytest.mark.parametrize("max_tokens", [1, 9, 10_000])
def test_each_token_is_scored_as_alone(kind: Any, max_tokens: int, model: Any) -> None:
    engine = Engine(model, kind, pad_id=2, max_tokens=max_tokens)
    scores = score(engine, PAIRS)
    assert model.training
    assert len(scores) == len(PAIRS)
    for pair, found in zip(PAIRS, scores, strict=True):
        losses, is_likeliest = alone(model, pair)
        assert len(found.losses_A) == len(pair.answer_ids)
        np.testing.assert_allclose(found.losses_A, losses, rtol=1e-5)
        assert (found.is_likeliest_A == is_likeliest).all()


def test_some_token_is_the_likeliest_and_some_is_not(model: Any) -> None:
    """Otherwise the comparison above could not fail."""
    first = alone(model, PAIRS[0])
    with torch.no_grad():
        likeliest = int(model.eval()(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1].argmax())
    model.train()
    (found,) = score(Engine(model, "trie", 2, 100), [Pair((1, 2, 3), (likeliest, 2))])
    assert found.is_likeliest_A[0]
    assert not first[1].all()


@pytest.mark.parametrize("kind", ["trie", "padded", "plain"])
def test_their_mean_is_the_held_out_loss(kind: Any, model: Any) -> None:
    engine = replace(Engine(model, kind, pad_id=2, max_tokens=12))
    assert mean_loss(score(engine, PAIRS)) == pytest.approx(held_out_loss(engine, PAIRS), rel=1e-6)
