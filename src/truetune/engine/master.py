"""Full fine-tuning in bf16: the optimizer's weights are fp32, and the model computes with a copy in its own dtype.

    model (bf16)     forward, backward ─► gradient of one forward (bf16) ─┐
      ▲                                                                   ▼ added in fp32, then freed
      └──── rounded, once after each update ──── masters (fp32) ◄── AdamW

An update of 1e-5 is less than half of what bf16 can tell at a weight of 0.02: added to bf16 weights it would be lost.
The copy is made once a step; autocast would round every weight again in each forward and each backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

NORM_BLOCK = 1 << 18
"""Numbers of a gradient whose squares are added up in fp32."""


@dataclass(frozen=True)
class Masters:
    """What the optimizer trains: `weights`, and which of the model's `parameters` each one stands behind.

    Where the model itself is in fp32, or trains LoRA, they are the same.
    """

    parameters: Sequence[torch.nn.Parameter]
    weights: Sequence[torch.nn.Parameter]

    def gather(self) -> None:
        """From now on, every gradient goes to the masters as soon as it is there."""
        for parameter, weight in zip(self.parameters, self.weights, strict=True):
            if parameter is not weight:
                parameter.register_post_accumulate_grad_hook(_adder(weight))

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def refresh(self, *_: Any) -> None:
        """Give the model the masters' values, rounded; called after each update, and when a checkpoint was loaded."""
        for parameter, weight in zip(self.parameters, self.weights, strict=True):
            if parameter is not weight:
                parameter.copy_(weight)


def optimised(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """Return the weights that an optimizer trains, in its order."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def gradient_norm(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the norm of all gradients together, a scalar in fp64.

    Block by block: torch's own norm adds up a tensor in fp32, and was 5e-5 off for an embedding of 28 million numbers.
    """
    flat = [weight.grad.flatten() for weight in weights if weight.grad is not None]
    squares = [block @ block for gradient in flat for block in gradient.split(NORM_BLOCK)]
    return torch.stack(squares).double().sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


def own_masters(model: torch.nn.Module) -> Masters:
    """Return the trained weights of `model` as they are: LoRA's, which are fp32."""
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Masters(own, own)


def keep_masters(model: torch.nn.Module, dtype: torch.dtype) -> Masters:
    """Return the trained weights of `model`; those that are wider than `dtype` stay so, and the model gets copies.

    Weights that the model keeps in fp32 always (transformers' `_keep_in_fp32_modules_strict`) are left alone.
    """
    wide = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    found: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        weight = parameter
        if parameter.dtype != dtype and not wide & set(name.split(".")):
            weight = torch.nn.Parameter(parameter.data)
            parameter.data = parameter.data.to(dtype)
        found.append((parameter, weight))
    return Masters([parameter for parameter, _ in found], [weight for _, weight in found])


def _adder(weight: torch.nn.Parameter) -> Any:
    def add(parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if weight.grad is None:
            weight.grad = gradient.float()
        else:
            weight.grad += gradient

    return add
