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

DROPOUT_LEVELS = 1 << 16


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
    is_kept, share = keep_mask(x, p) if p else (None, 1.0)
    fixed, trained = [], []
    for layer, name in zip(layers, names, strict=True):
        base = layer.get_base_layer()
        fixed.append(_Fixed(base.weight, base.bias, layer.scaling[name] / share))
        trained += [layer.lora_A[name].weight, layer.lora_B[name].weight]
    outputs: tuple[torch.Tensor, ...] = _Project.apply(x, is_kept, fixed, *trained)
    return outputs


def keep_mask(x: torch.Tensor, p: float) -> tuple[torch.Tensor, float]:
    """Return (int8 of x's shape: 1 where dropout keeps an element, else 0; the share that is kept on average).

    On a CPU, torch draws one number an element and takes 8 ms for 1,700 x 1,024; numpy draws 64 bits in half the time
    that torch does, and they serve four elements. So p is rounded to 1/65536 and the share says what it became: the
    expectation stays exact. The seed comes from torch, so that a recomputed forward draws the same again.
    """
    if x.device.type != "cpu":
        return (torch.rand(x.shape, device=x.device) >= p).to(torch.int8), 1 - p
    level = min(max(round(p * DROPOUT_LEVELS), 1), DROPOUT_LEVELS - 1)
    seed = int(torch.randint(1 << 62, ()))
    draws = torch.from_numpy(np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.int16))
    is_kept = draws.ge_(level - DROPOUT_LEVELS // 2)[: x.numel()].view(x.shape).to(torch.int8)
    return is_kept, 1 - level / DROPOUT_LEVELS


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
            grad_x = grad_rows[0] @ ctx.fixed[0].weight
            for layer, grad in zip(ctx.fixed[1:], grad_rows[1:], strict=True):
                grad_x.addmm_(grad, layer.weight)
            if is_kept is None:
                grad_x.addmm_(grad_inner, a)
            else:
                grad_x += _dropped(grad_inner @ a, is_kept)
            grad_x = grad_x.view(x.shape)
        pairs = zip(grad_as, grad_bs, strict=True)
        return grad_x, None, None, *(gradient for pair in pairs for gradient in pair)


def _columns(inner: torch.Tensor, bs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return each layer's columns of drop(x) A^T [rows, r]."""
    return tuple(inner.split([b.shape[1] for b in bs], dim=1))


def _dropped(rows: torch.Tensor, is_kept: torch.Tensor | None) -> torch.Tensor:
    """Return rows with zeros where nothing is kept: bits times 0 or 1, a third of the time of a product of floats."""
    if is_kept is None:
        return rows
    bits = torch.int16 if rows.element_size() == 2 else torch.int32
    return (rows.view(bits) * is_kept.flatten(0, -2).to(bits)).view(rows.dtype)
