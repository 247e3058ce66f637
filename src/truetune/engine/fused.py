"""RMSNorm and SwiGLU with backwards written by hand: each reads its input once and keeps nothing but it.

transformers' RMSNorm makes five fp32 copies of its input under autograd. Here rows go block by block through the core's
cache: 3 to 5 times faster on a CPU (docs/log.md), and the fp32 copies are never kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

BLOCK_VALUES = 1 << 18
"""Values of one block: 1 MB in fp32."""


class FusedRMSNorm(torch.nn.Module):
    """Takes the place of a transformers RMSNorm and shares its weight.

    `is_centred`: the weight is stored minus 1 and multiplied in fp32 (Gemma). `is_fused`: False gives the layer's own
    forward.
    """

    is_fused = True

    def __init__(self, layer: torch.nn.Module, *, eps: float, is_centred: bool) -> None:
        super().__init__()
        self.weight = layer.weight
        self.eps, self.is_centred = eps, is_centred
        # In a tuple, so that the layer's weight keeps one name.
        self._layer = (layer,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., D] / rms(x) times the weight."""
        if not self.is_fused:
            out: torch.Tensor = self._layer[0](x)
            return out
        weight = 1 + self.weight.float() if self.is_centred else self.weight
        normed: torch.Tensor = _RMSNorm.apply(x, weight, self.eps)
        return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(rows)
        rstd = torch.empty(len(rows), 1, dtype=torch.float32, device=x.device)
        for rows_b, out_b, rstd_b in _blocks(rows, out, rstd):
            wide = rows_b.float() if rows_b.dtype != torch.float32 else rows_b.clone()
            rstd_b.copy_(torch.linalg.vector_norm(wide, dim=-1, keepdim=True))
            rstd_b.pow_(2).div_(x.shape[-1]).add_(eps).rsqrt_()
            # Rounded where transformers rounds: before a weight in the base's dtype, after one in fp32 (Gemma).
            out_b.copy_(wide.mul_(rstd_b).to(weight.dtype).mul_(weight))
        ctx.save_for_backward(x, weight, rstd)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        out, wide_weight = torch.empty_like(rows), weight.float()
        for rows_b, grad_b, rstd_b, out_b in _blocks(rows, grad_rows, rstd, out):
            normed = rows_b.float() * rstd_b
            wide = grad_b.float() * wide_weight
            shared = torch.linalg.vecdot(wide, normed).unsqueeze(-1).div_(-x.shape[-1])
            out_b.copy_(wide.addcmul_(normed, shared).mul_(rstd_b))
        return out.view(x.shape), None, None


def _blocks(*tensors: torch.Tensor) -> Any:
    """Return the tensors' rows in blocks that fit a core's cache; in one block on other devices."""
    rows = tensors[0]
    size = max(BLOCK_VALUES // rows.shape[-1], 1) if rows.device.type == "cpu" else max(len(rows), 1)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


class FusedSwiGLU(torch.nn.Module):
    """Takes the place of a gated MLP with SiLU, down(silu(gate(x)) * up(x)), and shares its layers and their names."""

    is_fused = True

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = layer.gate_proj, layer.up_proj, layer.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the MLP's output for x [..., D]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        active = _SwiGLU.apply(gate, up) if self.is_fused else F.silu(gate) * up
        out: torch.Tensor = self.down_proj(active)
        return out


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps gate and up alone."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        for gate_b, up_b, out_b in _blocks(gate.flatten(0, -2), up.flatten(0, -2), out.flatten(0, -2)):
            torch.mul(F.silu(gate_b), up_b, out=out_b)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        tensors = (gate, up, grad, grad_gate, grad_up)
        for gate_b, up_b, grad_b, grad_gate_b, grad_up_b in _blocks(*(tensor.flatten(0, -2) for tensor in tensors)):
            torch.mul(F.silu(gate_b), grad_b, out=grad_up_b)
            grad_gate_b.copy_(torch.ops.aten.silu_backward(grad_b * up_b, gate_b))
        return grad_gate, grad_up


def fuse(model: torch.nn.Module) -> int:
    """Replace every RMSNorm and gated MLP of `model` that the fused layers compute, and return how many."""
    found = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            fused = _fused_norm(layer) or _fused_mlp(layer)
            if fused is not None:
                setattr(parent, name, fused.train(layer.training))
                found += 1
    return found


def use_fused(model: torch.nn.Module, *, is_fused: bool) -> None:
    """Turn every fused layer of `model` on, or off: then the layers it took the place of compute."""
    for layer in model.modules():
        if hasattr(layer, "is_fused"):
            layer.is_fused = is_fused


def _fused_norm(layer: torch.nn.Module) -> FusedRMSNorm | None:
    """Return a fused layer in place of an RMSNorm, or None. It is tried on random rows: names alone prove nothing."""
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    if not type(layer).__name__.endswith("RMSNorm") or isinstance(layer, FusedRMSNorm) or not isinstance(eps, float):
        return None
    if [name for name, _ in layer.named_parameters()] != ["weight"] or layer.weight.dim() != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(layer.weight), generator=generator).to(layer.weight.device, layer.weight.dtype)
    with torch.no_grad():
        for is_centred in (False, True):
            fused = FusedRMSNorm(layer, eps=eps, is_centred=is_centred)
            if torch.allclose(fused(x), layer(x), rtol=1e-2 if x.dtype != torch.float32 else 1e-5, atol=0):
                return fused
    return None


def _fused_mlp(layer: torch.nn.Module) -> FusedSwiGLU | None:
    """Return a fused layer in place of a gated MLP with SiLU, or None; the comparison before step 1 proves it."""
    children = {name for name, _ in layer.named_children()}
    if children != {"gate_proj", "up_proj", "down_proj", "act_fn"} or list(layer.parameters(recurse=False)):
        return None
    x = torch.linspace(-4, 4, 9)
    return FusedSwiGLU(layer) if torch.equal(layer.act_fn(x), F.silu(x)) else None
