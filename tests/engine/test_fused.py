"""Fused RMSNorm and SwiGLU against the layers whose place they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from truetune.engine import fused
from truetune.engine.fused import FusedRMSNorm, FusedSwiGLU, fuse, use_fused

SMALL = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
FAMILIES = {
    "llama": lambda **keys: LlamaForCausalLM(LlamaConfig(**SMALL, num_attention_heads=4, **keys)),
    "gemma2": lambda **keys: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=8, **keys)
    ),
}


def make(name: str) -> Any:
    """A model whose norms' weights are not all the same."""
    torch.manual_seed(0)
    model = FAMILIES[name]()
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


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("block_values", [1, 100, 1 << 18])
def test_norms_equal_the_models_own(name: str, block_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradient in fp32, in one block and in many."""
    monkeypatch.setattr(fused, "BLOCK_VALUES", block_values)
    layer = make(name).model.norm
    ours = fused._fused_norm(layer)
    assert isinstance(ours, FusedRMSNorm)
    assert ours.is_centred == (name == "gemma2")
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    for one, other in zip(run(ours, x), run(layer, x), strict=True):
        assert float((one - other).norm()) <= 1e-6 * float(other.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_norms_round_where_the_models_own_do(name: str) -> None:
    layer = make(name).model.norm.bfloat16()
    ours = fused._fused_norm(layer)
    assert ours is not None
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert float((ours(x) != layer(x)).float().mean()) < 0.01
    for one, other in zip(run(ours, x), run(layer, x), strict=True):
        assert float((one - other).float().norm()) <= 4e-3 * float(other.float().norm())


def test_swiglu_equals_the_models_own() -> None:
    mlp = make("llama").model.layers[0].mlp
    ours = fused._fused_mlp(mlp)
    assert isinstance(ours, FusedSwiGLU)
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    for one, other in zip(run(ours, x), run(mlp, x), strict=True):
        assert float((one - other).norm()) <= 1e-6 * float(other.norm())


def test_other_activations_are_left_alone() -> None:
    """Gemma's MLP is gated by GELU."""
    assert fused._fused_mlp(make("gemma2").model.layers[0].mlp) is None


def test_names_stay_and_each_layer_is_replaced_once() -> None:
    model = make("llama")
    names, whole = set(dict(model.named_parameters())), model(torch.arange(9)[None]).logits
    assert fuse(model) == 2 * 2 + 1 + 2
    assert fuse(model) == 0
    assert set(dict(model.named_parameters())) == names == set(model.state_dict())
    assert torch.allclose(model(torch.arange(9)[None]).logits, whole, rtol=1e-5, atol=1e-6)


def test_off_means_the_models_own_bits() -> None:
    model = make("llama")
    whole = model(torch.arange(9)[None]).logits
    fuse(model)
    use_fused(model, is_fused=False)
    assert torch.equal(model(torch.arange(9)[None]).logits, whole)


def test_layer_of_that_name_that_computes_something_else_is_left_alone() -> None:
    """It is tried, not believed."""

    class OddRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.abs().mean(-1, keepdim=True) * self.weight

    assert fused._fused_norm(OddRMSNorm()) is None
