"""The loss at learned positions only: logits exist for a chunk of them at a time, and never for anything else.

Chunked linear cross-entropy with its gradient computed in the forward (as in Cut Cross-Entropy, arXiv:2411.09009, and
Liger Kernel): the logits of a chunk are made, used for loss and gradient, and forgotten. Where the head itself is
trained, each chunk adds to its gradient before it is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

CHUNK_LOGITS = 1 << 25
"""Logits of one product with the head: 64 MB in bf16."""

BLOCK_LOGITS = 1 << 20
"""Logits turned into probabilities at once: 4 MB in fp32 stay in a core's cache; in larger blocks this takes as long as
the head's products (docs/log.md)."""


@dataclass(frozen=True)
class Head:
    """An output head: logits = cap * tanh(scale * (h W^T + bias) / cap); `softcap` None: without the cap."""

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def find_head(model: Any) -> Head | None:
    """Return the output head of a transformers model, frozen or trained; None if it is no plain linear layer.

    Soft caps (Gemma 2) and scales (Granite, Cohere) are read from the configuration; a head with anything else gives
    other logits than the model itself, which the comparison before step 1 finds.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not torch.nn.Linear:
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def edge_loss(
    hidden_ND: torch.Tensor, head: Head, *, parents_E: torch.Tensor, targets_E: torch.Tensor, weights_E: torch.Tensor
) -> torch.Tensor:
    """Return sum(weight * cross_entropy(logits[parent], target)) over the edges, in fp32 (nats).

    `parents_E` are rows of `hidden_ND`; logits are made once for each of them, in chunks.
    """
    rows, row_of_edge_E = torch.unique(parents_E, return_inverse=True)
    order = torch.argsort(row_of_edge_E)
    edges = (row_of_edge_E[order], targets_E[order], weights_E[order].float())
    weight_VD, bias_V = head.weight_VD, head.bias_V
    if not torch.is_grad_enabled():
        # A trained head would be given a gradient that nobody asks for.
        weight_VD, bias_V = weight_VD.detach(), None if bias_V is None else bias_V.detach()
    loss: torch.Tensor = _EdgeLoss.apply(hidden_ND.index_select(0, rows), weight_VD, bias_V, head, edges)
    return loss


def edge_losses(
    hidden_ND: torch.Tensor, head: Head, *, parents_E: torch.Tensor, targets_E: torch.Tensor
) -> torch.Tensor:
    """Return each edge's cross-entropy [E] (fp32, nats), for losses that are no sum over edges.

    What an edge will weigh is known only when all losses are. So each edge keeps the gradient that it has by itself,
    (p - 1 at the target) W, [E, D] as large as its hidden state, and the backward multiplies: no logits a second time.
    """
    losses_E: torch.Tensor = _EdgeLosses.apply(hidden_ND.index_select(0, parents_E), head, targets_E)
    return losses_E


def edge_scores(
    hidden_ND: torch.Tensor, head: Head, *, parents_E: torch.Tensor, targets_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each edge's cross-entropy [E] (fp32, nats), and whether its target is the likeliest token [E].

    In chunks of edges, so that two edges at one parent make its logits twice; nothing is kept for a gradient.
    """
    losses_E = torch.empty(len(parents_E), dtype=torch.float32, device=hidden_ND.device)
    is_likeliest_E = torch.empty(len(parents_E), dtype=torch.bool, device=hidden_ND.device)
    size = max(CHUNK_LOGITS // len(head.weight_VD), 1)
    for start in range(0, len(parents_E), size):
        chosen = slice(start, start + size)
        logits_CV = hidden_ND[parents_E[chosen]] @ head.weight_VD.T
        if head.bias_V is not None:
            logits_CV += head.bias_V
        wide_CV = logits_CV.float() * head.scale
        if head.softcap is not None:
            wide_CV = head.softcap * torch.tanh(wide_CV / head.softcap)
        losses_E[chosen] = F.cross_entropy(wide_CV, targets_E[chosen], reduction="none")
        is_likeliest_E[chosen] = wide_CV.argmax(-1) == targets_E[chosen]
    return losses_E, is_likeliest_E


class _EdgeLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        head: Head,
        edges: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_RD = torch.empty_like(hidden_RD) if needs_hidden else None
        grad_VD = None
        grad_V = torch.zeros(len(weight_VD), dtype=torch.float32, device=hidden_RD.device) if needs_bias else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_RD.device)
        size = min(_chunk_rows(weight_VD, is_trained=needs_weight), len(hidden_RD))
        # One buffer for all chunks: fresh memory costs as much as the product (page faults).
        buffer_CV = hidden_RD.new_empty(size, len(weight_VD))
        for start in range(0, len(hidden_RD), size):
            hidden_CD = hidden_RD[start : start + size]
            logits_CV = torch.mm(hidden_CD, weight_VD.T, out=buffer_CV[: len(hidden_CD)])
            if bias_V is not None:
                logits_CV += bias_V
            for row, block_V in _blocks(logits_CV):
                loss += _to_gradient(block_V, head, edges=_edges_of(edges, start + row, len(block_V))).sum()
            if grad_RD is not None:
                torch.mm(logits_CV, weight_VD, out=grad_RD[start : start + size])
            if needs_weight:
                grad_VD = logits_CV.T @ hidden_CD if grad_VD is None else grad_VD.addmm_(logits_CV.T, hidden_CD)
            if grad_V is not None:
                grad_V += logits_CV.sum(0, dtype=torch.float32)
        ctx.save_for_backward(grad_RD, grad_VD, None if grad_V is None else grad_V.to(weight_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Nobody else has them, and the head's may be large: scaled where they are. The scale stays fp32, since rounding
        # it to bf16 would make every gradient too large or too small alike.
        scaled = [None if some is None else some.mul_(grad) for some in ctx.saved_tensors]
        return *scaled, None, None


def _chunk_rows(weight_VD: torch.Tensor, *, is_trained: bool) -> int:
    """Return the rows of a chunk. Of a trained head, logits as large as its gradient, which each chunk rereads."""
    size = max(CHUNK_LOGITS // len(weight_VD), 1)
    return max(size, weight_VD.shape[1]) if is_trained else size


class _EdgeLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ED: torch.Tensor, head: Head, targets_E: torch.Tensor) -> torch.Tensor:
        grad_ED = torch.empty_like(hidden_ED) if ctx.needs_input_grad[0] else None
        losses_E = torch.empty(len(hidden_ED), dtype=torch.float32, device=hidden_ED.device)
        size = min(max(CHUNK_LOGITS // len(head.weight_VD), 1), len(hidden_ED))
        buffer_CV = hidden_ED.new_empty(size, len(head.weight_VD))
        for start in range(0, len(hidden_ED), size):
            hidden_CD = hidden_ED[start : start + size]
            logits_CV = torch.mm(hidden_CD, head.weight_VD.T, out=buffer_CV[: len(hidden_CD)])
            if head.bias_V is not None:
                logits_CV += head.bias_V
            for row, block_V in _blocks(logits_CV):
                targets = targets_E[start + row : start + row + len(block_V)]
                alone = (torch.arange(len(targets), device=targets.device), targets, torch.ones_like(targets).float())
                losses_E[start + row : start + row + len(targets)] = _to_gradient(block_V, head, edges=alone)
            if grad_ED is not None:
                torch.mm(logits_CV, head.weight_VD, out=grad_ED[start : start + size])
        ctx.save_for_backward(grad_ED)
        return losses_E

    @staticmethod
    def backward(ctx: Any, grad_E: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_ED,) = ctx.saved_tensors
        return (grad_ED * grad_E[:, None]).to(grad_ED.dtype), None, None


def _blocks(logits_CV: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first row, rows) of the blocks that are worked on at once: all of them where there is no cache to fit."""
    size = max(BLOCK_LOGITS // logits_CV.shape[1], 1) if logits_CV.device.type == "cpu" else len(logits_CV)
    for row in range(0, len(logits_CV), size):
        yield row, logits_CV[row : row + size]


def _edges_of(edges: tuple[torch.Tensor, ...], row: int, num_rows: int) -> tuple[torch.Tensor, ...]:
    """Return (row, target, weight) of the edges of `num_rows` rows from `row` on, their rows counted from it."""
    rows_E, targets_E, weights_E = edges
    bounds = torch.tensor([row, row + num_rows], device=rows_E.device)
    first, last = torch.searchsorted(rows_E, bounds).tolist()
    return rows_E[first:last] - row, targets_E[first:last], weights_E[first:last]


def _to_gradient(logits_CV: torch.Tensor, head: Head, *, edges: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return weight * loss of the edges of some rows, and turn the rows' raw logits, in place, into their gradient.

    With p = softmax and w = the weights of a row's edges, the gradient is (sum(w) p - w at the targets) times the
    slope of scale and cap.
    """
    rows, targets, weights = edges
    wide = logits_CV.float() * head.scale if head.scale != 1 else logits_CV.float()
    slope = None
    if head.softcap is not None:
        wide = torch.tanh(wide / head.softcap)
        slope = 1 - wide * wide
        wide *= head.softcap
    at_target = wide[rows, targets]
    most_C1 = wide.amax(-1, keepdim=True)
    exp_CV = (wide - most_C1 if wide.data_ptr() == logits_CV.data_ptr() else wide.sub_(most_C1)).exp_()
    sum_C1 = exp_CV.sum(-1, keepdim=True)
    losses = weights * ((sum_C1.log() + most_C1)[rows, 0] - at_target)
    weight_C1 = torch.zeros_like(sum_C1[:, 0]).index_add_(0, rows, weights)[:, None]
    exp_CV.mul_(weight_C1 * head.scale / sum_C1)
    exp_CV.index_put_((rows, targets), -weights * head.scale, accumulate=True)
    logits_CV.copy_(exp_CV if slope is None else exp_CV.mul_(slope))
    return losses
