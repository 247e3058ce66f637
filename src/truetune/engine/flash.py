"""Attention of long segments by torch's blocked CPU kernel (FlashAttention-2, arXiv:2307.08691): no scores are kept.

Queries see the whole shared path, and of their own segment what stands before them. That is two calls of the kernel,
joined by their log-sum-exps l:

              shared    own
    query 5   x x x x   x . .        out = exp(l_shared - l) out_shared + exp(l_own - l) out_own
    query 6   x x x x   x x .        l   = log(exp(l_shared) + exp(l_own))
    query 7   x x x x   x x x

The kernel's backward gets the joined out and l, and so works with the probabilities exp(score - l) of the whole path.
Source of the kernel: torch 2.13, aten/src/ATen/native/transformers/attention.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

MIN_FLASH_QUERIES = 256
"""Queries of a segment from which the kernel is faster than batched products (docs/log.md)."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class LongSegment:
    """The nodes from `first` to before `stop`, and the path that leads to them."""

    first: int
    stop: int
    shared_nodes: torch.Tensor

    def parts(self) -> Iterator[tuple[slice | torch.Tensor, bool]]:
        """Yield which keys a call sees, and whether in causal order."""
        if len(self.shared_nodes):
            yield self.shared_nodes, False
        yield slice(self.first, self.stop), True


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attend(segment: LongSegment, qkv: Tensors, *, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(q k^T * scale) v [Q, H, D] of a segment, and its log-sum-exp [1, H, Q] in fp32.

    `qkv`: of all nodes, q [N, H, D], k and v [N, G, D], where G divides H.
    """
    q_NHD, k_NGD, v_NGD = qkv
    q = _heads_first(q_NHD[segment.first : segment.stop])
    outs, sums = [], []
    for keys, is_causal in segment.parts():
        k, v = (_heads_first(_repeated(x[keys], q.shape[1])) for x in (k_NGD, v_NGD))
        out, log_sum = _forward(q, k, v, 0.0, is_causal, scale=scale)
        outs.append(out)
        sums.append(log_sum)
    if len(outs) == 1:
        return outs[0][0].transpose(0, 1), sums[0]
    log_sum = torch.logaddexp(*sums)
    joined = sum(out * (part - log_sum).exp_()[..., None] for out, part in zip(outs, sums, strict=True))
    return joined[0].transpose(0, 1).to(q_NHD.dtype), log_sum


def add_gradients(segment: LongSegment, qkv: Tensors, *, results: Tensors, scale: float, into: Tensors) -> None:
    """Add a segment's gradients to `into` (q as the model's, k and v in fp32; all of all nodes).

    `results`: out_NHD, its gradient, and the segment's log-sum-exp.
    """
    own = slice(segment.first, segment.stop)
    q, out, grad = (_heads_first(x[own]) for x in (qkv[0], results[0], results[1]))
    grad_q_NHD, *grads_NGD = into
    grad_q = torch.zeros(q.shape, dtype=torch.float32)
    for keys, is_causal in segment.parts():
        k, v = (_heads_first(_repeated(x[keys], q.shape[1])) for x in qkv[1:])
        grad_q_part, *grad_parts = _backward(grad, q, k, v, out, results[2], 0.0, is_causal, scale=scale)
        grad_q += grad_q_part
        for grad_NGD, part in zip(grads_NGD, grad_parts, strict=True):
            grouped = part[0].transpose(0, 1).unflatten(1, (grad_NGD.shape[1], -1)).sum(2, dtype=torch.float32)
            nodes = keys if isinstance(keys, torch.Tensor) else torch.arange(segment.first, segment.stop)
            grad_NGD.index_add_(0, nodes, grouped)
    grad_q_NHD[own] = grad_q[0].transpose(0, 1).to(grad_q_NHD.dtype)


def _heads_first(x_QHD: torch.Tensor) -> torch.Tensor:
    return x_QHD.transpose(0, 1)[None]


def _repeated(x_LGD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return keys (or values) with as many heads as there are of queries."""
    return x_LGD.repeat_interleave(num_heads // x_LGD.shape[1], dim=1)
