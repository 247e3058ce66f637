"""PEFT's LoRA layer with a fused forward and backward, for one layer or several that read the same input (q, k, v).

    y_i = x W_i^T + bias_i + s_i (drop(x) A_i^T) B_i^T

The input is kept once, the frozen weights get no gradient and no work, and the A_i are one product. A and B stay fp32
and are used in the dtype of the activations. PEFT makes these layers itself (custom modules of its configuration), so
names, saving and merging stay PEFT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft.tuners import lora
from torch.nn import functional as F

DROPOUT_LEVELS = 1 << 8
"""Thresholds that one random byte can tell apart."""


class FusedLinear(lora.Linear):
    """PEFT's Linear. `is_fused`: whether training takes the fused function; False leaves everything to PEFT."""

    is_fused = True

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output for x [..., in]."""
        if args or kwargs or self.plain_adapter() is None:
            return super().forward(x, *args, **kwargs)
        return project(x, [self])[0]

    def plain_adapter(self) -> str | None:
        """Return the active adapter's name if the fused function computes what PEFT would, else None."""
        if not self.is_fused or self.disable_adapters or self.merged:
            return None
        if len(self.active_adapters) != 1 or self.active_adapters[0] not in self.lora_A or self.lora_variant:
            return None
        name: str = self.active_adapters[0]
        layer = self.get_base_layer()
        is_plain = type(layer) is torch.nn.Linear and not layer.weight.requires_grad and not self.lora_bias[name]
        return name if is_plain else None

    def dropout_p(self, name: str) -> float:
        """Return how much of the input an adapter drops at the moment."""
        dropout = self.lora_dropout[name]
        return float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0


def project(x: torch.Tensor, layers: Sequence[torch.nn.Module]) -> tuple[torch.Tensor, ...]:
    """Return what each layer makes of x [..., in].

    Fused layers with the same dropout share one mask: it is drawn and applied once. Each layer by itself is dropped as
    PEFT drops it.
    """
    names = [layer.plain_adapter() if isinstance(layer, FusedLinear) else None for layer in layers]
    if None in names or len({layer.dropout_p(name) for layer, name in zip(layers, names, strict=True)}) != 1:
        return tuple(layer(x) for layer in layers)
    p = layers[0].dropout_p(names[0])
    is_kept = keep_mask(x, p) if p else None
    fixed, trained = [], []
    for layer, name in zip(layers, names, strict=True):
        base = layer.get_base_layer()
        fixed.append(_Fixed(base.weight, base.bias, layer.scaling[name] / (1 - p)))
        trained += [layer.lora_A[name].weight, layer.lora_B[name].weight]
    outputs: tuple[torch.Tensor, ...] = _Project.apply(x, is_kept, fixed, *trained)
    return outputs


def keep_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """Return int8 of x's shape [..., D]: 1 where dropout keeps an element, else 0.

    On a CPU, torch draws one number an element and takes 8 ms for 1,700 x 1,024; here each has one random byte, and p
    lies between two thresholds for bytes. Every row of D takes one of the two, at random, so that an element's own
    chance is p exactly:

        p = 0.1 = 25.6 / 256      6 rows of 10: bytes below 26 are dropped;  4 of 10: bytes below 25

    The seed comes from torch, so that a recomputed forward draws the same again.
    """
    if x.device.type != "cpu" or p > 0.99:  # past 255/256 a byte cannot tell
        return (torch.rand(x.shape, device=x.device) >= p).to(torch.int8)
    seed = int(torch.randint(1 << 62, ()))
    draws = torch.from_numpy(np.random.SFC64(seed).random_raw(-(-x.numel() // 8)).view(np.int8))
    thresholds = (p * DROPOUT_LEVELS + torch.rand(*x.shape[:-1], 1)).floor_().sub_(DROPOUT_LEVELS // 2)
    return draws[: x.numel()].view(x.shape).ge_(thresholds.to(torch.int8))


@dataclass(frozen=True)
class _Fixed:
    """What of a layer gets no gradient: W [out, in], bias [out], and the scale s."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float


class _Project(torch.autograd.Function):
    """The projections of x [..., in] by several layers; `trained` is A_1 [r, in], B_1 [out, r], A_2, B_2, ..."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, is_kept: torch.Tensor | None, fixed: list[_Fixed], *trained: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        rows, bs = x.flatten(0, -2), trained[1::2]
        inner = _dropped(rows, is_kept) @ torch.cat(trained[::2]).to(x.dtype).T
        outputs = []
        for layer, b, inner_i in zip(fixed, bs, _columns(inner, bs), strict=True):
            out = F.linear(rows, layer.weight, layer.bias).addmm_(inner_i, (b * layer.scale).to(x.dtype).T)
            outputs.append(out.view(*x.shape[:-1], -1))
        ctx.save_for_backward(x, is_kept, inner, *trained)
        ctx.fixed = fixed
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, is_kept, inner, *trained = ctx.saved_tensors
        a, bs, rows = torch.cat(trained[::2]).to(x.dtype), trained[1::2], x.flatten(0, -2)
        grad_rows = [grad.flatten(0, -2) for grad in grads]
        grad_inners, grad_bs = [], []
        for layer, b, inner_i, grad in zip(ctx.fixed, bs, _columns(inner, bs), grad_rows, strict=True):
            grad_inners.append(grad @ (b * layer.scale).to(x.dtype))
            grad_bs.append((inner_i.T @ grad).T.float().mul_(layer.scale))
        grad_inner = torch.cat(grad_inners, dim=1)
        grad_as = (grad_inner.T @ _dropped(rows, is_kept)).float().split([b.shape[1] for b in bs])
        grad_x = None
        if ctx.needs_input_grad[0]:
            # The adapter's part first: the large products add to it as they write, which costs nothing.
            grad_x = _drop_(grad_inner @ a, is_kept)
            for layer, grad in zip(ctx.fixed, grad_rows, strict=True):
                grad_x.addmm_(grad, layer.weight)
            grad_x = grad_x.view(x.shape)
        pairs = zip(grad_as, grad_bs, strict=True)
        return grad_x, None, None, *(gradient for pair in pairs for gradient in pair)


def _columns(inner: torch.Tensor, bs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return each layer's columns of drop(x) A^T [rows, r]."""
    return tuple(inner.split([b.shape[1] for b in bs], dim=1))


def _dropped(rows: torch.Tensor, is_kept: torch.Tensor | None) -> torch.Tensor:
    """Return rows with zeros where nothing is kept: bits times 0 or 1, a third of the time of a product of floats."""
    return rows if is_kept is None else (_bits(rows) * _factors(rows, is_kept)).view(rows.dtype)


def _drop_(rows: torch.Tensor, is_kept: torch.Tensor | None) -> torch.Tensor:
    """The same in place."""
    if is_kept is not None:
        _bits(rows).mul_(_factors(rows, is_kept))
    return rows


def _bits(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(torch.int16 if rows.element_size() == 2 else torch.int32)


def _factors(rows: torch.Tensor, is_kept: torch.Tensor) -> torch.Tensor:
    return is_kept.flatten(0, -2).to(_bits(rows).dtype)
