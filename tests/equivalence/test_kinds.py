"""Kinds of LoRA: trie, padded rows and one pair at a time are what PEFT alone computes, on a base that it changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.equivalence.test_families import CASES, SMALL, loss_and_gradients, random_pairs
from tests.kinds import KINDS, STARTED
from truetune.engine.compare import choose_engine, use_kind
from truetune.engine.step import Engine
from truetune.model import add_lora
from truetune.records import Pair

FAMILIES = ("qwen3", "llama", "gemma2", "phi3")
WAYS = (("trie", 1 << 40), ("trie", 40), ("padded", 1 << 40), ("plain", 1))


def base_of(family: str) -> Any:
    """A tiny random model, fp32."""
    name, more = CASES[family]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**SMALL, **more}), dtype=torch.float32)


def moved(model: Any) -> Any:
    """The same small step from where training starts, on every trained weight."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def ours(base: Any, kind: dict[str, Any]) -> Any:
    """LoRA as Truetune makes it."""
    return moved(add_lora(base, r=4, alpha=8, dropout=0.0, targets=["all-linear"], seed=0, **kind))


def by_peft(base: Any, kind: dict[str, Any]) -> Any:
    """LoRA as PEFT alone makes it; its base has no longer what training starts at."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **kind)
    return moved(get_peft_model(base, config))


def plain_loss_and_gradients(model: Any, pairs: list[Pair]) -> tuple[float, dict[str, torch.Tensor]]:
    """Pair by pair, by transformers' own loss."""
    num_learned = sum(len(pair.answer_ids) for pair in pairs)
    total = 0.0
    for pair in pairs:
        ids = torch.tensor([pair.prompt_ids + pair.answer_ids])
        labels = ids.clone()
        labels[:, : len(pair.prompt_ids)] = -100
        loss = model(input_ids=ids, labels=labels).loss * len(pair.answer_ids) / num_learned
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_is_plain_peft(family: str, kind: str) -> None:
    """Loss within 1e-5, every gradient tensor within 1e-5 of its norm; DoRA's lengths are among them.

    Twice that where PEFT rounds W - s B0 A0, which here is never made.
    """
    most = 2e-5 if kind in STARTED else 1e-5
    base, pairs = base_of(family), random_pairs()
    wanted_loss, wanted = plain_loss_and_gradients(by_peft(copy.deepcopy(base), KINDS[kind]), pairs)
    model = ours(base, KINDS[kind])
    assert choose_engine(Engine(model, "plain", 0, 1 << 40), pairs).engine.kind == "trie"
    compared = 0
    for way, max_tokens in WAYS:
        loss, found = loss_and_gradients(use_kind(Engine(model, way, 0, max_tokens)), pairs)
        assert loss == pytest.approx(wanted_loss, rel=1e-5), way
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert float((found[name] - gradient).norm()) <= most * float(gradient.norm()), (way, name)
            compared += 1
    assert compared >= len(WAYS) * 3 * 4 * 2
    assert any("magnitude" in name for name in wanted) == ("dora" in kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", STARTED)
def test_the_start_is_the_base(kind: str, dtype: torch.dtype) -> None:
    """Before step 1, and with the adapter off at any time, the model says what the base says, to the bit; no weight
    of the base has moved."""
    base = base_of("qwen3").to(dtype).eval()
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    ids = torch.tensor([random_pairs()[0].prompt_ids])
    with torch.no_grad():
        wanted = base(input_ids=ids).logits
        model = add_lora(base, r=4, alpha=8, dropout=0.0, targets=["all-linear"], seed=0, **KINDS[kind]).eval()
        # fuse() has norms of its own, in another order of sums.
        first = model(input_ids=ids).logits
        with model.disable_adapter():
            off = model(input_ids=ids).logits
        assert torch.equal(first, off)
        tuned = moved(model).eval()(input_ids=ids).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, off)
    assert float((off - wanted).abs().max()) <= (1e-5 if dtype == torch.float32 else 0.1)
    assert float((tuned - off).abs().max()) > 1e-3
    after = {name.replace(".base_layer", ""): weight for name, weight in model.get_base_model().state_dict().items()}
    assert len(before) > 20
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("kind", ["rslora", "pissa", "dora"])
def test_planted_faults_are_seen(kind: str) -> None:
    """rsLoRA's scale ignored, PiSSA's start not taken out, DoRA's lengths left as they were: far from plain PEFT."""
    base, pairs = base_of("qwen3"), random_pairs()
    wanted_loss, _ = plain_loss_and_gradients(by_peft(copy.deepcopy(base), KINDS[kind]), pairs)
    model = ours(base, KINDS[kind])
    for layer in model.modules():
        if not hasattr(layer, "lora_A"):
            continue
        if kind == "rslora":
            layer.scaling["default"] = 8 / 4
        elif kind == "pissa":
            layer.start_A.zero_()
        else:
            vector = layer.lora_magnitude_vector["default"]
            vector.weight.data = layer.get_base_layer().weight.norm(dim=1)
    loss, _ = loss_and_gradients(use_kind(Engine(model, "trie", 0, 1 << 40)), pairs)
    assert abs(loss / wanted_loss - 1) > 1e-4
