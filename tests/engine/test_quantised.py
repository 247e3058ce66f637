"""Quantised layers: the product is that of the dequantised weights, in training, evaluation and behind an adapter."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.equivalence.test_families import loss_and_gradients, random_pairs
from tests.equivalence.test_kinds import moved, plain_loss_and_gradients
from tests.small import small_model
from truetune.engine.compare import choose_engine, use_kind
from truetune.engine.quantised import Dequantised, dequantise_layers, held_bytes
from truetune.engine.step import Engine, find_head
from truetune.model import add_lora, count_parameters, find_base, load_base
from truetune.quantisation import BITS

# bitsandbytes' own 8-bit product says of each call that it rounds its input.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model on disk."""
    return small_model(tmp_path_factory.mktemp("quantised") / "base", intermediate_size=128)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_every_way_is_plain_peft_on_plain_bitsandbytes(bits: str, kind: str, folder: Path) -> None:
    """In training, where bitsandbytes dequantises, too; loss and every gradient, fp32."""
    pairs = random_pairs()
    config = BitsAndBytesConfig(**BITS[bits](torch.float32))
    theirs = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, quantization_config=config)
    if (bits, kind) == ("8bit", "dora"):
        # PEFT 0.21 moves the weights for DoRA, after which bitsandbytes' own layer has lost their scales on a CPU.
        dequantise_layers(theirs)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **KINDS[kind])
    wanted_loss, wanted = plain_loss_and_gradients(moved(get_peft_model(theirs, lora)), pairs)
    base = load_base(find_base(str(folder), quantization=bits), "float32")
    model = moved(add_lora(base, r=4, alpha=8, dropout=0.0, targets=["all-linear"], seed=0, **KINDS[kind]))
    assert find_head(base) is not None
    assert choose_engine(Engine(model, "plain", 0, 1 << 40), pairs).engine.kind == "trie"
    compared = 0
    for way, max_tokens in (("trie", 1 << 40), ("trie", 40), ("padded", 1 << 40), ("plain", 1)):
        loss, found = loss_and_gradients(use_kind(Engine(model, way, 0, max_tokens)), pairs)
        assert loss == pytest.approx(wanted_loss, rel=1e-5), way
        for name, gradient in wanted.items():
            assert float((found[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), (way, name)
            compared += 1
    assert compared >= 4 * 2 * 3 * 7


@pytest.mark.parametrize("bits", BITS)
def test_evaluation_is_training_without_dropout(bits: str, folder: Path) -> None:
    """To the bit, before and after; and the gradient is still there (bitsandbytes' own is gone after an evaluation,
    where it packs the weights anew)."""
    model = load_base(find_base(str(folder), quantization=bits), "float32")
    model = moved(add_lora(model, r=4, alpha=8, dropout=0.0, targets=["all-linear"], seed=0))
    engine, pairs = use_kind(Engine(model, "trie", 0, 1 << 40)), random_pairs()
    ids = torch.tensor([pairs[0].prompt_ids])
    loss, gradients = loss_and_gradients(engine, pairs)
    with torch.no_grad():
        trained, used = model(input_ids=ids).logits, model.eval()(input_ids=ids).logits
        with torch.inference_mode():
            one_by_one = model(input_ids=ids[:, :5]).logits
    assert torch.equal(trained, used)
    assert torch.allclose(one_by_one, used[:, :5], atol=1e-5)
    again, others = loss_and_gradients(use_kind(Engine(model.train(), "trie", 0, 1 << 40)), pairs)
    assert again == loss
    assert all(torch.equal(others[name], gradient) for name, gradient in gradients.items())
    assert sum(float(gradient.norm()) > 0 for gradient in gradients.values()) == len(gradients) == 2 * 3 * 7


@pytest.mark.parametrize(("bits", "most"), [("4bit", 0.12), ("8bit", 0.02)])
def test_layers_memory_and_counts(bits: str, most: float, folder: Path) -> None:
    """All linear layers but the head are quantised, near their weights; what they hold is told."""
    plain, model = (load_base(find_base(str(folder), quantization=q), "float32") for q in (None, bits))
    weights = {name: layer.weight for name, layer in plain.named_modules() if isinstance(layer, torch.nn.Linear)}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Dequantised)}
    assert layers.keys() == weights.keys() - {"lm_head"}
    assert dequantise_layers(model) == 0
    for name, layer in layers.items():
        dense = layer.dense(torch.float32)
        assert 1e-4 < float((dense - weights[name]).norm() / weights[name].norm()) < most
        x = torch.randn(3, dense.shape[1], requires_grad=True)
        assert torch.equal(layer(x), torch.nn.functional.linear(x, dense))
    bytes_of = {"4bit": 0.52, "8bit": 1.07}[bits]
    quantised = sum(weight.numel() for name, weight in weights.items() if name != "lm_head")
    assert held_bytes(model) < held_bytes(plain) - (4 - bytes_of) * quantised + 16 * 1024 * len(layers)
    assert count_parameters(model)[1] == count_parameters(plain)[1]


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="reads /proc")
def test_the_file_does_not_stay_in_memory(folder: Path, tmp_path: Path) -> None:
    """What is not quantised is copied out of the mapped file, of which every page was read; a plain base maps it."""
    maps = Path("/proc/self/maps")
    mapped = {}
    for bits in (None, "4bit", "8bit"):
        own = shutil.copytree(folder, tmp_path / str(bits))
        model = load_base(find_base(str(own), quantization=bits), "float32")
        mapped[bits] = f"{own}/model.safetensors" in maps.read_text()
        assert count_parameters(model)[1] > 0
    assert mapped == {None: True, "4bit": False, "8bit": False}


def test_a_bias_is_added(folder: Path) -> None:
    layer = load_base(find_base(str(folder), quantization="4bit"), "float32").model.layers[0].mlp.up_proj
    x = torch.ones(2, 64)
    with_bias = copy.copy(layer)
    with_bias._parameters = {**layer._parameters, "bias": torch.nn.Parameter(torch.ones(128), requires_grad=False)}
    assert torch.allclose(with_bias(x), layer(x) + 1)
