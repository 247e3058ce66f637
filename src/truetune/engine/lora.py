"""PEFT's LoRA layer with a fused forward and backward: one function for W x + s B A x, which keeps x once.

The frozen weight gets no gradient and no work; A and B stay fp32 and are used in the dtype of the activations. PEFT
makes these layers itself (custom modules of its configuration), so names, saving and merging stay PEFT's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners import lora
from torch.nn import functional as F

DROPOUT_LEVELS = 1 << 16


class FusedLinear(lora.Linear):
    """PEFT's Linear. `is_fused`: whether training takes the fused function; False leaves everything to PEFT."""

    is_fused = True

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output for x [..., in]."""
        name = self._plain_adapter() if not args and not kwargs else None
        if name is None:
            return super().forward(x, *args, **kwargs)
        base, dropout = self.get_base_layer(), self.lora_dropout[name]
        p = float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0
        is_kept, share = keep_mask(x, p) if p else (None, 1.0)
        fixed = _Fixed(base.weight, base.bias, self.scaling[name] / share, is_kept)
        out: torch.Tensor = _FusedLora.apply(x, self.lora_A[name].weight, self.lora_B[name].weight, fixed)
        return out

    def _plain_adapter(self) -> str | None:
        """Return the active adapter's name if the fused function computes what PEFT would, else None."""
        if not self.is_fused or self.disable_adapters or self.merged:
            return None
        if len(self.active_adapters) != 1 or self.active_adapters[0] not in self.lora_A or self.lora_variant:
            return None
        name: str = self.active_adapters[0]
        layer = self.get_base_layer()
        is_plain = type(layer) is torch.nn.Linear and not layer.weight.requires_grad and not self.lora_bias[name]
        return name if is_plain else None


def keep_mask(x: torch.Tensor, p: float) -> tuple[torch.Tensor, float]:
    """Return (int8 of x's shape: 1 where dropout keeps an element, else 0; the share that is kept on average).

    On a CPU, torch draws one number an element and takes 8 ms for 1,700 x 1,024; here one draw of 64 bits serves four
    elements, so p is rounded to 1/65536 and the share says what it became: the expectation stays exact.
    """
    if x.device.type != "cpu":
        return (torch.rand(x.shape, device=x.device) >= p).to(torch.int8), 1 - p
    level = min(max(round(p * DROPOUT_LEVELS), 1), DROPOUT_LEVELS - 1)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    is_kept = draws.ge_(level - DROPOUT_LEVELS // 2)[: x.numel()].view(x.shape).to(torch.int8)
    return is_kept, 1 - level / DROPOUT_LEVELS


@dataclass(frozen=True)
class _Fixed:
    """What gets no gradient: W [out, in], bias [out], the scale s, and what dropout keeps of x."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    is_kept: torch.Tensor | None


class _FusedLora(torch.autograd.Function):
    """x W^T + bias + scale * (drop(x) A^T) B^T for x [..., in], A [r, in], B [out, r]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, fixed: _Fixed) -> torch.Tensor:
        rows = x.flatten(0, -2)
        inner = _dropped(rows, fixed.is_kept) @ a.to(x.dtype).T
        out = F.linear(rows, fixed.weight, fixed.bias)
        out.addmm_(inner, (b * fixed.scale).to(x.dtype).T)
        ctx.save_for_backward(x, a, b, inner)
        ctx.fixed = fixed
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, inner = ctx.saved_tensors
        fixed = ctx.fixed
        grad_rows = grad.flatten(0, -2)
        grad_inner = grad_rows @ (b * fixed.scale).to(x.dtype)
        grad_b = (inner.T @ grad_rows).T.float().mul_(fixed.scale)
        grad_a = (grad_inner.T @ _dropped(x.flatten(0, -2), fixed.is_kept)).float()
        if not ctx.needs_input_grad[0]:
            return None, grad_a, grad_b, None
        grad_x = grad_rows @ fixed.weight
        if fixed.is_kept is None:
            grad_x.addmm_(grad_inner, a.to(x.dtype))
        else:
            grad_x += _dropped(grad_inner @ a.to(x.dtype), fixed.is_kept)
        return grad_x.view(x.shape), grad_a, grad_b, None


def _dropped(rows: torch.Tensor, is_kept: torch.Tensor | None) -> torch.Tensor:
    """Return rows with zeros where nothing is kept: bits times 0 or 1, a third of the time of a product of floats."""
    if is_kept is None:
        return rows
    bits = torch.int16 if rows.element_size() == 2 else torch.int32
    return (rows.view(bits) * is_kept.flatten(0, -2).to(bits)).view(rows.dtype)
