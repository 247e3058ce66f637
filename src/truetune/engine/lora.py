"""PEFT's LoRA layer with a fused forward and backward, for one layer or several that read the same input (q, k, v).

    y_i = x W_i^T + bias_i + s_i (drop(x) A_i^T) B_i^T

The input is kept once, the frozen weights get no gradient and no work, and the A_i are one product. A and B stay fp32
and are used in the dtype of the activations. PEFT makes these layers itself (custom modules of its configuration), so
names, saving and merging stay PEFT's.

PiSSA and OLoRA start at factors A0, B0 of W itself. PEFT takes them out of W (W - s B0 A0); here W stays what it is,
and what training changed is added, as two products with small factors, so that nothing large cancels in bf16:

    y = x W^T + s x (B A - B0 A0)^T           B A - B0 A0 = [B - B0 | B0] [A ; A - A0]          (rank 2 r)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from truetune.engine.quantised import Dequantised
from truetune.engine.quiet import lora

DROPOUT_LEVELS = 1 << 8
"""Thresholds that one random byte can tell apart."""


class FusedLinear(lora.Linear):
    """PEFT's Linear. `is_fused`: whether training takes the fused function; False leaves everything to PEFT.

    `start`: (A0 [r, in], B0 [out, r]) in fp32 of an adapter that starts at factors of the base; else None.
    """

    is_fused = True
    is_from_base = False

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output for x [..., in]."""
        if not args and not kwargs and self.plain_adapter() is not None:
            return project(x, [self])[0]
        out: torch.Tensor = super().forward(x, *args, **kwargs)
        if self.start is None or self.disable_adapters or self.merged:
            return out
        a, b = self.start
        return out - (F.linear(F.linear(x.to(a.dtype), a), b) * self.scaling[self.active_adapters[0]]).to(out.dtype)

    def plain_adapter(self) -> str | None:
        """Return the active adapter's name if the fused function computes what PEFT would, else None."""
        if not self.is_fused or self.disable_adapters or self.merged:
            return None
        if len(self.active_adapters) != 1 or self.active_adapters[0] not in self.lora_A or self.lora_variant:
            return None
        name: str = self.active_adapters[0]
        layer = self.get_base_layer()
        is_known = type(layer) is torch.nn.Linear or isinstance(layer, Dequantised)
        is_plain = is_known and not layer.weight.requires_grad and not self.lora_bias[name]
        return name if is_plain else None

    def dropout_p(self, name: str) -> float:
        """Return how much of the input an adapter drops at the moment."""
        dropout = self.lora_dropout[name]
        return float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0

    @property
    def start(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The factors of the base that training started at."""
        return (self.start_A, self.start_B) if "start_A" in self._buffers else None

    def keep_start(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Take A0 [r, in] and B0 [out, r], which are copied, for the start."""
        self.register_buffer("start_A", a.detach().clone(), persistent=False)
        self.register_buffer("start_B", b.detach().clone(), persistent=False)

    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """Let PEFT choose A and B, and give the base its weights back."""
        with self._whole_base():
            super().pissa_init(adapter_name, init_lora_weights)

    def olora_init(self, adapter_name: str) -> None:
        """Let PEFT choose A and B, and give the base its weights back."""
        with self._whole_base():
            super().olora_init(adapter_name)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return what an adapter adds to the base's weights [out, in]; merging asks for it."""
        delta: torch.Tensor = super().get_delta_weight(adapter)
        if self.start is None:
            return delta
        a, b = self.start
        return delta - (b @ a * self.scaling[adapter]).to(delta.dtype)

    @contextmanager
    def _whole_base(self) -> Iterator[None]:
        """PEFT subtracts what it starts at from the weights: of a copy, inside the block."""
        weight = self.get_base_layer().weight
        whole = weight.data
        weight.data = whole.clone()
        yield
        weight.data = whole
        self.is_from_base = True


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
        fixed.append(_Fixed(base, layer.scaling[name] / (1 - p), layer.start))
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
    """What of a layer gets no gradient: the base layer with W [out, in] and bias [out], the scale s, A0 and B0."""

    base: torch.nn.Module
    scale: float
    start: tuple[torch.Tensor, torch.Tensor] | None

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W, dequantised for the moment if it is quantised."""
        weight: torch.Tensor = self.base.dense(dtype) if isinstance(self.base, Dequantised) else self.base.weight
        return weight

    def factors(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors [k, in], [out, k] of what is added to W: A and B themselves; with a start, of rank 2 r."""
        if self.start is None:
            return a, b
        return torch.cat([a, a - self.start[0]]), torch.cat([b - self.start[1], self.start[1]], dim=1)

    def of_a(self, grad_inner: torch.Tensor) -> torch.Tensor:
        """Return A's part [rows, r] of the gradient at the inner side: A is in both halves of a start's factors."""
        if self.start is None:
            return grad_inner
        first, second = grad_inner.chunk(2, dim=1)
        return first + second


class _Project(torch.autograd.Function):
    """The projections of x [..., in] by several layers; `trained` is A_1 [r, in], B_1 [out, r], A_2, B_2, ..."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, is_kept: torch.Tensor | None, fixed: list[_Fixed], *trained: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        rows = x.flatten(0, -2)
        factors_a, factors_b = _factors_of(fixed, trained)
        inner = _dropped(rows, is_kept) @ torch.cat(factors_a).to(x.dtype).T
        outputs = []
        for layer, b, inner_i in zip(fixed, factors_b, _columns(inner, factors_b), strict=True):
            out = F.linear(rows, layer.dense(x.dtype), layer.base.bias)
            out.addmm_(inner_i, (b * layer.scale).to(x.dtype).T)
            outputs.append(out.view(*x.shape[:-1], -1))
        ctx.save_for_backward(x, is_kept, inner, *trained)
        ctx.fixed = fixed
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, is_kept, inner, *trained = ctx.saved_tensors
        factors_a, factors_b = _factors_of(ctx.fixed, trained)
        a, bs, rows = torch.cat(factors_a).to(x.dtype), trained[1::2], x.flatten(0, -2)
        grad_rows = [grad.flatten(0, -2) for grad in grads]
        grad_inners, grad_bs = [], []
        columns = _columns(inner, factors_b)
        for layer, b, factor_b, inner_i, grad in zip(ctx.fixed, bs, factors_b, columns, grad_rows, strict=True):
            grad_inners.append(grad @ (factor_b * layer.scale).to(x.dtype))
            grad_bs.append((inner_i[:, : b.shape[1]].T @ grad).T.float().mul_(layer.scale))
        of_as = [layer.of_a(grad) for layer, grad in zip(ctx.fixed, grad_inners, strict=True)]
        grad_as = (torch.cat(of_as, dim=1).T @ _dropped(rows, is_kept)).float().split([b.shape[1] for b in bs])
        grad_x = None
        if ctx.needs_input_grad[0]:
            # The adapter's part first: the large products add to it as they write, which costs nothing.
            grad_x = _drop_(torch.cat(grad_inners, dim=1) @ a, is_kept)
            for layer, grad in zip(ctx.fixed, grad_rows, strict=True):
                grad_x.addmm_(grad, layer.dense(x.dtype))
            grad_x = grad_x.view(x.shape)
        pairs = zip(grad_as, grad_bs, strict=True)
        return grad_x, None, None, *(gradient for pair in pairs for gradient in pair)


def _factors_of(
    fixed: Sequence[_Fixed], trained: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    pairs = [layer.factors(a, b) for layer, a, b in zip(fixed, trained[::2], trained[1::2], strict=True)]
    return [a for a, _ in pairs], [b for _, b in pairs]


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
