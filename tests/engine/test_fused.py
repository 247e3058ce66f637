"""Fused RMSNorm, SwiGLU and rotary attention against the layers' own forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from truetune.engine import fused
from truetune.engine.fused import FusedAttention, FusedRMSNorm, FusedSwiGLU, fuse, use_fused

SMALL = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
MODELS: dict[str, Any] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=8)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_attention_heads=4)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    ),
}
FAMILIES = ("llama", "gemma2")


def make(name: str) -> Any:
    """A model whose norms' weights are not all the same."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for key, parameter in model.named_parameters():
        if "norm" in key:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.requires_grad_(False)


def run(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient."""
    x = x.clone().requires_grad_()
    out = layer(x)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    (out * weights).sum().backward()
    return out.detach(), x.grad


def both(layer: Any, call: Any, x: torch.Tensor) -> Any:
    """Pairs of output and gradient: fused, and the layer's own."""
    results = []
    for is_fused in (True, False):
        use_fused(layer, is_fused=is_fused)
        results.append(run(call, x))
    return zip(*results, strict=True)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("block_values", [1, 100, 1 << 18])
def test_norms_equal_the_models_own(name: str, block_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradient in fp32, in one block and in many."""
    monkeypatch.setattr(fused, "BLOCK_VALUES", block_values)
    layer = make(name).model.norm
    assert fuse(layer) == 1
    assert isinstance(layer, FusedRMSNorm)
    assert layer.is_centred == (name == "gemma2")
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    for one, other in both(layer, layer, x):
        assert float((one - other).norm()) <= 1e-6 * float(other.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_norms_round_where_the_models_own_do(name: str) -> None:
    layer = make(name).model.norm.bfloat16()
    assert fuse(layer) == 1
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    outputs, gradients = both(layer, layer, x)
    assert float((outputs[0] != outputs[1]).float().mean()) < 0.01
    for one, other in (outputs, gradients):
        assert float((one - other).float().norm()) <= 4e-3 * float(other.float().norm())


def test_swiglu_equals_the_models_own() -> None:
    mlp = make("llama").model.layers[0].mlp
    assert fuse(mlp) == 1
    assert isinstance(mlp, FusedSwiGLU)
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    for one, other in both(mlp, mlp, x):
        assert float((one - other).norm()) <= 1e-6 * float(other.norm())


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("block_values", [1, 500, 1 << 18])
def test_attention_equals_the_models_own(name: str, block_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With norms of queries and keys (Qwen3) and without (Llama), through SDPA; positions differ from row to row."""
    monkeypatch.setattr(fused, "BLOCK_VALUES", block_values)
    model = make(name)
    layer = model.model.layers[0].self_attn
    assert fuse(layer) == (3 if name == "qwen3" else 1)
    assert isinstance(layer, FusedAttention)
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    positions = model.model.rotary_emb(x, torch.stack([torch.arange(7), torch.arange(3, 10)]))
    for one, other in both(layer, lambda x: layer(x, position_embeddings=positions, attention_mask=None)[0], x):
        assert float((one - other).norm()) <= 1e-6 * float(other.norm())


def test_eager_attention_is_left_to_the_model() -> None:
    """It is no registered function, so the layer's own forward takes it."""
    model = make("llama")
    model.set_attn_implementation("eager")
    wanted = model(torch.arange(9)[None]).logits
    fuse(model.model.layers[0].self_attn)
    assert torch.equal(model(torch.arange(9)[None]).logits, wanted)


def test_generation_with_a_cache_is_left_to_the_model() -> None:
    model = make("llama").eval()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ids = torch.arange(1, 9)[None]
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    fuse(model)
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), wanted)


def test_other_activations_are_left_alone() -> None:
    """Gemma's MLP is gated by GELU."""
    assert fuse(make("gemma2").model.layers[0].mlp) == 0


def test_names_stay_and_each_layer_is_fused_once() -> None:
    model = make("llama")
    names, whole = set(dict(model.named_parameters())), model(torch.arange(9)[None]).logits
    assert fuse(model) == 2 * 2 + 1 + 2 + 2
    assert fuse(model) == 0
    assert set(dict(model.named_parameters())) == names == set(model.state_dict())
    assert torch.allclose(model(torch.arange(9)[None]).logits, whole, rtol=1e-5, atol=1e-6)


def test_off_means_the_models_own_bits() -> None:
    model = make("llama")
    whole = model(torch.arange(9)[None]).logits
    fuse(model)
    use_fused(model, is_fused=False)
    assert torch.equal(model(torch.arange(9)[None]).logits, whole)


def test_no_class_of_the_library_is_changed() -> None:
    """Only layers of our own model get another class."""
    fuse(make("llama"))
    fresh = make("llama")
    assert type(fresh.model.norm).__name__ == "LlamaRMSNorm"
    assert not any(hasattr(layer, "is_fused") for layer in fresh.modules())


def test_layer_of_that_name_that_computes_something_else_is_left_alone() -> None:
    """It is tried, not believed."""

    class OddRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.abs().mean(-1, keepdim=True) * self.weight

    assert fuse(OddRMSNorm()) == 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("block_values", [1, 100, 1 << 18])
def test_trained_norms_get_their_gradient(name: str, block_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight of a layer, norms of queries and keys included, in one block and in many; frozen ones get none."""
    monkeypatch.setattr(fused, "BLOCK_VALUES", block_values)
    model = make(name).requires_grad_(True)
    assert fuse(model) > 4
    ids = torch.randint(1, 20, (2, 9), generator=torch.Generator().manual_seed(1))
    found = []
    for is_fused in (True, False):
        use_fused(model, is_fused=is_fused)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append({key: p.grad.clone() for key, p in model.named_parameters()})
    norms = [key for key in found[1] if "norm" in key]
    assert len(norms) == {"llama": 5, "gemma2": 9, "qwen3": 9}[name]
    for key, wanted in found[1].items():
        assert float(wanted.norm()) > 0
        assert float((found[0][key] - wanted).norm()) <= 1e-5 * float(wanted.norm()), key
    model.requires_grad_(False)
    use_fused(model, is_fused=True)
    model.zero_grad(set_to_none=True)
    model.get_input_embeddings().weight.requires_grad_(True)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is None for key, p in model.named_parameters() if "norm" in key)


def test_bf16_norms_sum_their_gradient_in_fp32() -> None:
    """Of 4,000 rows: added up in bf16, one by one, the sum would stand still at 256 times a term."""
    layer = make("llama").model.norm.bfloat16().requires_grad_(True)
    fuse(layer)
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    layer(x).float().sum().backward()
    wide = x.double()
    wanted = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).sum(0)
    assert float((layer.weight.grad.double() - wanted).norm()) <= 5e-3 * float(wanted.norm())
