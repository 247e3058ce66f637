"""Layers whose weights bitsandbytes keeps in 4 or 8 bits: dequantised for each product, and never computed otherwise.

bitsandbytes itself computes otherwise in training than in evaluation on a CPU: it packs 4-bit weights anew, with scales
cut to bf16, after which a product has no gradient; in 8 bits it rounds the inputs, too (0.50: nn/modules.py,
autograd/_functions.py). Here training, evaluation and use are one product, row by row, so that tries stay exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from truetune.engine.quiet import dequantize_bnb_weight, get_bnb_param_type


class Dequantised(torch.nn.Module):
    """A frozen layer of bitsandbytes; its class is made of this and its own (see `dequantise_layers`)."""

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weights [out, in] as numbers; nothing is kept."""
        weight: torch.Tensor = dequantize_bnb_weight(self.weight, state=getattr(self, "state", None))
        return weight.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for x [..., in]."""
        out: torch.Tensor = _Product.apply(x, self)
        return out


class _Product(torch.autograd.Function):
    """x W^T + bias; W is made again for the backward, so that neither x nor W is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Dequantised) -> torch.Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.dense(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.dense(grad.dtype), None


def dequantise_layers(model: torch.nn.Module) -> int:
    """Let every quantised layer of `model` multiply by its dequantised weights; return how many there are."""
    found = 0
    for layer in model.modules():
        if is_quantised(getattr(layer, "weight", None)) and not isinstance(layer, Dequantised):
            # PEFT goes by the name of the class.
            layer.__class__ = type(type(layer).__name__, (Dequantised, type(layer)), {})
            found += 1
    return found


def is_quantised(weight: Any) -> bool:
    """Return whether bitsandbytes keeps a weight."""
    return bool(get_bnb_param_type(weight))


def held_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model's weights in memory, each one once, with the scales of quantised ones."""
    tensors = [*model.parameters(), *model.buffers()]
    for layer in model.modules():
        if isinstance(layer, Dequantised):
            tensors += _scales(layer.weight)
    return sum(int(tensor.numel()) * tensor.element_size() for tensor in tensors)


def _scales(weight: Any) -> list[torch.Tensor]:
    if get_bnb_param_type(weight) == "8bit":
        return [scales] if (scales := weight.SCB) is not None else []
    states = [weight.quant_state, weight.quant_state.state2]
    return [tensor for state in states if state is not None for tensor in (state.absmax, state.code)]
