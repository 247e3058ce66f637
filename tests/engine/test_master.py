"""fp32 masters behind a model in bf16: what they gather, what the model gets, what would be lost without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from truetune.engine.master import gradient_norm, keep_masters, own_masters


def make(dtype: torch.dtype, *, wide: set[str] | None = None) -> tuple[Any, Any]:
    """Two linear layers in fp32, cut down to `dtype`, and their masters."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    model[0].bias.requires_grad_(False)
    model._keep_in_fp32_modules_strict = wide
    return model, keep_masters(model, dtype)


def test_in_fp32_the_model_is_its_own_master() -> None:
    model, masters = make(torch.float32)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(own) == 3
    for kept in (masters, own_masters(model)):
        assert all(one is two is three for one, two, three in zip(kept.parameters, kept.weights, own, strict=True))
    masters.gather()
    model(torch.ones(2, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in own)


def test_gradients_of_several_forwards_are_added_in_fp32() -> None:
    """512 times the same gradient: bf16 stops counting at 256."""
    model, masters = make(torch.bfloat16)
    assert [weight.dtype for weight in masters.weights] == [torch.float32] * 3
    assert {parameter.dtype for parameter in masters.parameters} == {torch.bfloat16}
    assert model[0].bias.dtype == torch.float32
    model[0].bias.data = model[0].bias.data.bfloat16()
    masters.gather()
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in masters.weights]
    for _ in range(512):
        model(x).float().sum().backward()
        assert all(parameter.grad is None for parameter in masters.parameters)
        for total, weight in zip(sums, masters.weights, strict=True):
            total += weight.grad.double() / 512 if _ == 511 else 0
    model(x).float().sum().backward()
    for total, weight in zip(sums, masters.weights, strict=True):
        assert float((weight.grad.double() - 513 * total).norm()) <= 1e-5 * float(weight.grad.norm())


@pytest.mark.parametrize("has_masters", [True, False])
def test_small_updates_are_not_lost(has_masters: bool) -> None:
    """A hundred updates of 1e-5: with masters the weights move by 1e-3, without them not at all."""
    _, masters = make(torch.bfloat16)
    before = [parameter.detach().float().clone() for parameter in masters.parameters]
    optimizer = torch.optim.SGD(masters.weights if has_masters else masters.parameters, lr=1e-5)
    optimizer.register_step_post_hook(masters.refresh if has_masters else lambda *_: None)
    for _ in range(100):
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.ones_like(weight)
        optimizer.step()
    large = [(one.detach().float() - two)[two.abs() > 0.1] for one, two in zip(masters.parameters, before, strict=True)]
    moved = torch.cat(large)
    assert len(moved) > 20
    assert float(moved.mean()) == (pytest.approx(-1e-3, rel=0.2) if has_masters else 0)


def test_what_a_model_keeps_in_fp32_stays() -> None:
    model, masters = make(torch.bfloat16, wide={"1"})
    assert {parameter.dtype for parameter in model[1].parameters()} == {torch.float32}
    assert model[0].weight.dtype == torch.bfloat16
    assert masters.weights[-1] is model[1].bias


def test_the_norm_of_a_large_gradient_is_right() -> None:
    """To 1e-6, also where the whole is a thousand times as large as a block; what has no gradient counts nothing."""
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3000, 1000), (7,), (5, 2))]
    generator = torch.Generator().manual_seed(0)
    for weight in weights[:2]:
        weight.grad = torch.rand(weight.shape, generator=generator)
    wanted = sum(float(weight.grad.double().pow(2).sum()) for weight in weights[:2]) ** 0.5
    assert float(gradient_norm(weights)) == pytest.approx(wanted, rel=1e-6)
    assert float(gradient_norm(weights[2:])) == 0
