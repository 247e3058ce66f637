"""RMSNorm, SwiGLU and rotary attention with backwards written by hand: each keeps its input and nothing else.

Norms' weights get their gradient, summed in fp32, where they are trained.

transformers' RMSNorm makes five fp32 copies of its input under autograd, rotary positions four more. Here rows go block
by block through the core's cache: 3 to 5 times faster on a CPU (docs/log.md), and no copy is kept.

A layer that is fused gets another class, made of a mixin below and its own: names, weights and children stay, and with
`is_fused` False its own forward computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from truetune.engine.hybrid import BranchingMixer, is_mixer
from truetune.engine.lora import project

BLOCK_VALUES = 1 << 18
"""Values of one block: 1 MB in fp32."""

ROTARY_ATTENTIONS = ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe")
"""Families whose attention is: project, norm queries and keys or not, rotate, attend, project."""


class FusedRMSNorm(torch.nn.Module):
    """x / rms(x) * weight, or * (1 + weight) if `is_centred` (Gemma)."""

    is_fused = True
    is_centred = False
    weight: torch.nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of x [..., D]."""
        if not self.is_fused:
            out: torch.Tensor = super().forward(x)
            return out
        normed: torch.Tensor = _RMSNorm.apply(x, _factor(self.weight, self.is_centred), _eps(self))
        return normed


class FusedSwiGLU(torch.nn.Module):
    """down(silu(gate(x)) * up(x))."""

    is_fused = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the MLP's output for x [..., D]."""
        if not self.is_fused:
            out: torch.Tensor = super().forward(x)
            return out
        gate, up = project(x, [self.gate_proj, self.up_proj])
        down: torch.Tensor = self.down_proj(_SwiGLU.apply(gate, up))
        return down


class FusedAttention(torch.nn.Module):
    """Attention with rotary positions; queries and keys are normed and rotated in one pass."""

    is_fused = True

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output for hidden_states [B, T, D]; `position_embeddings`: cos and sin, [B, T, head size] each."""
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
        norms = [getattr(self, name, None) for name in ("q_norm", "k_norm")]
        is_known = all(norm is None or isinstance(norm, FusedRMSNorm) for norm in norms)
        is_whole = position_embeddings[0].shape[-1] == self.head_dim
        has_cache = kwargs.get("past_key_values") is not None
        if not self.is_fused or has_cache or attend is None or not is_known or not is_whole:
            out: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
                hidden_states, position_embeddings=position_embeddings, **kwargs
            )
            return out
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (x.view(heads) for x in project(hidden_states, [self.q_proj, self.k_proj, self.v_proj]))
        q, k = (_rotated(x, position_embeddings, norm).transpose(1, 2) for x, norm in zip((q, k), norms, strict=True))
        dropout = self.attention_dropout if self.training else 0.0
        mask = kwargs.pop("attention_mask", None)
        mixed, weights = attend(self, q, k, v.transpose(1, 2), mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(mixed.reshape(*heads[:-2], -1)), weights


def fuse(model: torch.nn.Module) -> int:
    """Fuse every layer of `model` that the mixins compute, and return how many."""
    found = 0
    for layer in model.modules():
        mixin, facts = _mixin_of(layer)
        if mixin is not None:
            layer.__class__ = type(f"Fused{type(layer).__name__}", (mixin, type(layer)), facts)
            found += 1
    return found


def use_fused(model: torch.nn.Module, *, is_fused: bool) -> None:
    """Turn every fused layer of `model` on, or off: then its own forward computes."""
    for layer in model.modules():
        if hasattr(layer, "is_fused"):
            layer.is_fused = is_fused


def _mixin_of(layer: torch.nn.Module) -> tuple[type[torch.nn.Module] | None, dict[str, Any]]:
    """Return the mixin that computes what a layer computes, or None, and what the fused class is to know.

    The comparison before step 1 proves it.
    """
    name = type(layer).__name__
    if hasattr(layer, "is_fused"):
        return None, {}
    if name.endswith("RMSNorm"):
        is_centred = _is_centred(layer)
        return (None if is_centred is None else FusedRMSNorm), {"is_centred": is_centred}
    if {child for child, _ in layer.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        x = torch.linspace(-4, 4, 9)
        return (FusedSwiGLU if torch.equal(layer.act_fn(x), F.silu(x)) else None), {}
    if is_mixer(layer):
        return BranchingMixer, {}
    return (FusedAttention if name in {f"{family}Attention" for family in ROTARY_ATTENTIONS} else None), {}


def _factor(weight: torch.Tensor, is_centred: bool) -> torch.Tensor:
    """Return what a norm multiplies by; a centred weight is stored minus 1, and fp32 from there on."""
    return 1 + weight.float() if is_centred else weight


def _eps(layer: torch.nn.Module) -> Any:
    return getattr(layer, "variance_epsilon", getattr(layer, "eps", None))


def _is_centred(layer: torch.nn.Module) -> bool | None:
    """Return which of the two RMSNorms a layer computes, None if neither. It is tried: names alone prove nothing."""
    if [name for name, _ in layer.named_parameters()] != ["weight"] or not isinstance(_eps(layer), float):
        return None
    weight = layer.weight.detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(weight), generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        wanted = layer(x)
        for is_centred in (False, True):
            found = _RMSNorm.apply(x, _factor(weight, is_centred), _eps(layer))
            if torch.allclose(found, wanted, rtol=1e-2 if x.dtype != torch.float32 else 1e-5, atol=0):
                return is_centred
    return None


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the tensors' rows in blocks that fit a core's cache; in one block on other devices."""
    rows = tensors[0]
    row_values = max(rows[:1].numel(), 1)
    size = max(BLOCK_VALUES // row_values, 1) if rows.device.type == "cpu" else max(len(rows), 1)
    yield from zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, rstd: torch.Tensor) -> torch.Tensor:
    """Return x / rms(x) * weight over the last axis, and write 1 / rms(x) into `rstd`."""
    wide = x.float() if x.dtype != torch.float32 else x.clone()
    # vecdot and not vector_norm, which is off by two to four times as much (1.3e-6 of 2,560 numbers).
    rstd.copy_(torch.linalg.vecdot(wide, wide).unsqueeze(-1))
    rstd.div_(x.shape[-1]).add_(eps).rsqrt_()
    # Rounded where transformers rounds: before a weight in the base's dtype, after one in fp32 (Gemma).
    return wide.mul_(rstd).to(weight.dtype).mul_(weight)


def _norm_gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, rstd: torch.Tensor, for_weight: torch.Tensor | None
) -> torch.Tensor:
    """Return the gradient of `_norm` for x, in fp32; what these rows give for the weight is added to `for_weight`."""
    normed = x.float() * rstd
    if for_weight is not None:
        for_weight += (grad.float() * normed).flatten(0, -2).sum(0)
    wide = grad.float() * weight.float()
    shared = torch.linalg.vecdot(wide, normed).unsqueeze(-1).div_(-x.shape[-1])
    return wide.addcmul_(normed, shared).mul_(rstd)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # Not a view of rows: FSDP2 hangs its hooks on what a model returns, and warns of views.
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rstd = torch.empty(len(rows), 1, dtype=torch.float32, device=x.device)
        for rows_b, out_b, rstd_b in _blocks(rows, out.view(rows.shape), rstd):
            out_b.copy_(_norm(rows_b, weight, eps, rstd=rstd_b))
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        out = torch.empty_like(rows)
        for_weight = _sums_for(weight, is_trained=ctx.needs_input_grad[1])
        for grad_b, rows_b, rstd_b, out_b in _blocks(grad_rows, rows, rstd, out):
            out_b.copy_(_norm_gradient(grad_b, rows_b, weight, rstd=rstd_b, for_weight=for_weight))
        return out.view(x.shape), None if for_weight is None else for_weight.to(weight.dtype), None


def _sums_for(weight: torch.Tensor | None, *, is_trained: bool) -> torch.Tensor | None:
    """Return zeros in fp32 for a weight's gradient, None if it is frozen."""
    return torch.zeros_like(weight, dtype=torch.float32) if is_trained and weight is not None else None


def _rotated(x: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor], norm: FusedRMSNorm | None) -> torch.Tensor:
    """Return x [B, T, heads, D], normed if there is a norm, and rotated by its position."""
    cos, sin = (table.expand(*x.shape[:2], -1) for table in positions)
    weight = None if norm is None else _factor(norm.weight, norm.is_centred)
    out: torch.Tensor = _NormRotary.apply(x, cos, sin, weight, None if norm is None else _eps(norm))
    return out


class _NormRotary(torch.autograd.Function):
    """y = norm(x); out = y * cos + rotate_half(y) * sin, with rotate_half((u, w)) = (-w, u)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor | None, eps: float | None
    ) -> torch.Tensor:
        rows = x.flatten(0, 1)
        out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        rstd = torch.empty(*rows.shape[:2], 1, dtype=torch.float32, device=x.device)
        half = x.shape[-1] // 2
        tables = (cos.flatten(0, 1)[:, None], sin.flatten(0, 1)[:, None])
        for rows_b, out_b, rstd_b, cos_b, sin_b in _blocks(rows, out, rstd, *tables):
            y = rows_b if weight is None else _norm(rows_b, weight, eps or 0.0, rstd=rstd_b).to(x.dtype)
            torch.mul(y, cos_b, out=out_b)
            out_b[..., :half].addcmul_(y[..., half:], sin_b[..., :half], value=-1)
            out_b[..., half:].addcmul_(y[..., :half], sin_b[..., half:])
        ctx.save_for_backward(*([] if weight is None else [x, weight, rstd]), *tables)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *normed, cos, sin = ctx.saved_tensors
        rows = grad.flatten(0, 1)
        out = torch.empty(rows.shape, dtype=grad.dtype, device=grad.device)
        half = grad.shape[-1] // 2
        # x and rstd where there is a norm; else the gradient stands in for them and is not read.
        kept = (normed[0].flatten(0, 1), normed[2]) if normed else (rows, rows)
        for_weight = _sums_for(normed[1] if normed else None, is_trained=ctx.needs_input_grad[3])
        for rows_b, out_b, cos_b, sin_b, x_b, rstd_b in _blocks(rows, out, cos, sin, *kept):
            back = rows_b * cos_b
            back[..., :half].addcmul_(rows_b[..., half:], sin_b[..., half:])
            back[..., half:].addcmul_(rows_b[..., :half], sin_b[..., :half], value=-1)
            if normed:
                back = _norm_gradient(back, x_b, normed[1], rstd=rstd_b, for_weight=for_weight)
            out_b.copy_(back)
        grad_weight = None if for_weight is None else for_weight.to(normed[1].dtype)
        return out.view(grad.shape), None, None, grad_weight, None


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
