"""The fused LoRA layer against PEFT's own, and its dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from truetune.engine.lora import FusedLinear, keep_mask, project


class Layer(torch.nn.Module):
    """One linear layer with a name to target."""

    def __init__(self, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(24, 40, bias=bias, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output."""
        return self.proj(x)


def make(*, is_ours: bool, bias: bool = False, dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    """A layer with LoRA, by PEFT alone or with our layer; same weights both times, B not 0."""
    torch.manual_seed(0)
    layer = Layer(bias=bias, dtype=dtype)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["proj"], **keys)
    if is_ours:
        config._register_custom_module({torch.nn.Linear: FusedLinear})
    model = get_peft_model(layer, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.train()


def run(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and the gradients of x, A and B."""
    x = x.clone().requires_grad_()
    out = model(x)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    (out * weights).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24)])
def test_same_as_peft(bias: bool, shape: tuple[int, ...]) -> None:
    """Output and every gradient, in fp32."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    ours, plain = run(make(is_ours=True, bias=bias), x), run(make(is_ours=False, bias=bias), x)
    assert len(ours) == 4
    for one, other in zip(ours, plain, strict=True):
        assert one.dtype == other.dtype
        assert float((one - other).norm()) <= 1e-6 * float(other.norm())


def test_bf16_base_keeps_fp32_adapters() -> None:
    """Computed in the base's dtype; weights and their gradients are fp32 (E8)."""
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(2)).bfloat16()
    ours, plain = (run(make(is_ours=is_ours, dtype=torch.bfloat16), x) for is_ours in (True, False))
    assert [tensor.dtype for tensor in ours] == [torch.bfloat16] * 2 + [torch.float32] * 2
    for one, other in zip(ours, plain, strict=True):
        assert float((one - other).float().norm()) <= 2e-2 * float(other.float().norm())


def test_base_weight_gets_no_gradient() -> None:
    model = make(is_ours=True, bias=True)
    run(model, torch.ones(2, 24))
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }


@pytest.mark.parametrize("keys", [{"use_dora": True}, {"lora_bias": True, "bias": "none"}])
def test_variants_go_through_peft(keys: dict[str, Any]) -> None:
    """DoRA and LoRA with bias are PEFT's to compute: same numbers to the bit."""
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
    for one, other in zip(run(make(is_ours=True, **keys), x), run(make(is_ours=False, **keys), x), strict=True):
        assert torch.equal(one, other)


def test_disabled_adapter_is_the_base() -> None:
    model = make(is_ours=True)
    x = torch.ones(2, 24)
    with model.disable_adapter():
        assert torch.equal(model(x), model.base_model.model.proj.base_layer(x))


def test_dropout_of_the_fused_layer_is_peft_s_formula() -> None:
    """With the mask drawn again from the same seed, PEFT's formula gives output and gradients."""
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(2))
    model = make(is_ours=True, lora_dropout=0.4)
    torch.manual_seed(5)
    ours = run(model, x)
    torch.manual_seed(5)
    is_kept = keep_mask(x, 0.4)
    plain = make(is_ours=False)
    layer = plain.base_model.model.proj

    class Kept(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * is_kept / (1 - 0.4)

    layer.lora_dropout["default"] = Kept()
    wanted = run(plain, x)
    assert 0 < int((is_kept == 0).sum()) < is_kept.numel()
    for one, other in zip(ours, wanted, strict=True):
        assert float((one - other).norm()) <= 1e-6 * float(other.norm())


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.93, 0.995])
def test_dropout_drops_p_of_all_elements(p: float) -> None:
    """Within five sigma of p on four million draws, in all and in each column; 0 and 1 are all there is."""
    torch.manual_seed(3)
    is_kept = keep_mask(torch.empty(4000, 1003), p)
    assert set(is_kept.unique().tolist()) == {0, 1}
    # Rows differ by a threshold of 1/256, so the mean varies a little more than that of independent draws.
    sigma = (p * (1 - p) / is_kept.numel() + (0.5 / 256) ** 2 / len(is_kept)) ** 0.5
    assert float(is_kept.float().mean()) == pytest.approx(1 - p, abs=5 * sigma)
    columns = is_kept.float().mean(0)
    assert float((columns - (1 - p)).abs().max()) < 6 * (p * (1 - p) / len(is_kept)) ** 0.5


def test_dropout_follows_the_seed() -> None:
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(keep_mask(torch.empty(40, 40), 0.3))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_layers_of_one_input_are_projected_together(p: float) -> None:
    """Three layers at once equal the three alone; with dropout, the three with one mask."""
    models = [make(is_ours=True, bias=n == 1, lora_dropout=p) for n in range(3)]
    layers = [model.base_model.model.proj for model in models]
    for n, layer in enumerate(layers):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.2 + n)
    results = []
    for is_together in (True, False):
        x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2)).requires_grad_()
        torch.manual_seed(5)
        if is_together:
            outputs = project(x, layers)
        else:
            outputs = []
            for layer in layers:
                torch.manual_seed(5)
                outputs.append(layer(x))
        sum((out * (n + 1) * torch.linspace(-1, 1, 40)).sum() for n, out in enumerate(outputs)).backward()
        weights = [p for model in models for p in model.parameters() if p.requires_grad]
        results.append([*(out.detach() for out in outputs), x.grad, *(weight.grad for weight in weights)])
        for weight in weights:
            weight.grad = None
    assert len(results[0]) == 3 + 1 + 6
    for one, other in zip(*results, strict=True):
        assert float((one - other).norm()) <= 2e-6 * float(other.norm())


def test_layers_that_differ_in_dropout_or_kind_run_alone() -> None:
    """A linear layer without LoRA, and one with other dropout: each computes by itself."""
    first, second = make(is_ours=True, lora_dropout=0.5).eval(), make(is_ours=True).eval()
    layers = [first.base_model.model.proj, second.base_model.model.proj, torch.nn.Linear(24, 3)]
    x = torch.ones(2, 24)
    for out, layer in zip(project(x, layers), layers, strict=True):
        assert torch.allclose(out, layer(x), rtol=1e-6)
