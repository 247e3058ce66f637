"""The gated delta rule along a trie (Gated DeltaNet, arXiv:2412.06464), with a backward by hand.

Each head keeps a state S [K, V]. A token decays it by exp(g), corrects by the share beta what it tells of the token's
key, and is answered by its query (keys and queries have length 1; queries are scaled by K^-1/2):

    S = exp(g) S        S = S + beta k (v - S^T k)^T        out = S^T q

A segment of L steps is computed at once (their section 3.3), from the state S in which its parent ended. With
c = cumsum(g), D_ij = exp(c_i - c_j) for j <= i, else 0:

    U   = (I + M)^-1 beta (v - exp(c) k S)        M = beta (k k^T) D below the diagonal
    out = exp(c) q S + A U                        A = (q k^T) D
    end = exp(c_L) S + (exp(c_L - c) k)^T U

Siblings read one state, so their queries and keys are one product with it, and it is never copied; ends are computed
where something goes on from them. Kept for the backward are the inputs, U, and the states; the rest is computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from truetune.engine.branches import Branches, Group

EPSILON = 1e-6
"""Added to the squared length of keys and queries, as in transformers."""


def delta_rule(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    gates: tuple[torch.Tensor, torch.Tensor],
    *,
    branches: Branches,
) -> torch.Tensor:
    """Return the output [N, H, V] of queries and keys [N, G, K], and values [N, H, V], where G divides H.

    `gates`: g (at most 0) and beta, [N, H] each.
    """
    g, beta = (gate.float() for gate in gates)
    out: torch.Tensor = _DeltaRule.apply(branches, *inputs, g, beta)
    return out


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, branches: Branches, *inputs: torch.Tensor) -> torch.Tensor:
        query, key, value, g, beta = inputs
        rows = _Rows(branches, *_units(query, key), value, g, beta)
        out = _room(value)
        states: torch.Tensor | None = None
        ctx.states, ctx.us = [], []
        for wave in branches.waves:
            ctx.states.append(states)
            ends = []
            for group in wave:
                part = _Part(rows, group)
                u = part.corrections(states)
                rows.put(group, part.answers(states, u), into=out)
                if group.ends is not None:
                    ends.append(part.end(states, u))
                ctx.us.append(u)
            states = torch.cat(ends, dim=1) if ends else None
        ctx.save_for_backward(*inputs)
        ctx.branches = branches
        return out[:-1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, g, beta = ctx.saved_tensors
        rows = _Rows(ctx.branches, *_units(query, key), value, g, beta)
        grads = tuple(_room(x) for x in (rows.query, rows.key, value, g, beta))
        us = list(ctx.us)
        grad_ends: torch.Tensor | None = None
        for wave, states in zip(reversed(ctx.branches.waves), reversed(ctx.states), strict=True):
            grad_states = None if states is None else torch.zeros_like(states)
            for group in reversed(wave):
                grad_end = None if grad_ends is None or group.ends is None else grad_ends[:, slice(*group.ends)]
                part = _Part(rows, group)
                found = part.gradients(rows.take(grad, group), u=us.pop(), states=(states, grad_states), end=grad_end)
                for gradient, into in zip(found, grads, strict=True):
                    rows.put(group, gradient, into=into)
            grad_ends = grad_states
        grad_query, grad_key, *others = (x[:-1] for x in grads)
        grad_query, grad_key = _units_gradient((grad_query, grad_key), query, key)
        return None, grad_query, grad_key, *others


def _room(x: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor like x with a row more, where padding is written."""
    return x.new_empty(len(x) + 1, *x.shape[1:])


def _lengths(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x in fp32 and 1 / its length over the last axis."""
    wide = x.float()
    return wide, torch.rsqrt(torch.linalg.vecdot(wide, wide).unsqueeze(-1) + EPSILON)


def _units(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries of length K^-1/2 and keys of length 1."""
    (q, q_factor), (k, k_factor) = _lengths(query), _lengths(key)
    return (q * (q_factor * q.shape[-1] ** -0.5)).to(query.dtype), (k * k_factor).to(key.dtype)


def _units_gradient(
    grads: tuple[torch.Tensor, torch.Tensor], query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return the gradient of `_units`: without the part along the unit, divided by the length."""
    found = []
    for grad, x, scale in ((grads[0], query, query.shape[-1] ** -0.5), (grads[1], key, 1.0)):
        wide, factor = _lengths(x)
        unit, grad_wide = wide * factor, grad.float()
        along = torch.linalg.vecdot(unit, grad_wide).unsqueeze(-1)
        found.append(grad_wide.addcmul_(unit, along, value=-1).mul_(factor * scale).to(x.dtype))
    return tuple(found)


@dataclass(frozen=True)
class _Rows:
    """What tokens bring: query and key [N, G, K], value [N, H, V], g and beta [N, H]. A part of it: [H, S, L, ...]."""

    branches: Branches
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor

    def take(self, x: torch.Tensor, group: Group) -> torch.Tensor:
        """Return a group's part of x [N, heads, ...], zeros where it is padding; heads of keys serve several."""
        num_heads, heads = self.value.shape[1], torch.arange(self.value.shape[1], device=x.device)[:, None]
        nodes = self.branches.nodes_P[group.places]
        places = nodes * x.shape[1] + heads // (num_heads // x.shape[1])
        part = x.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, (num_heads, -1))
        part.index_fill_(1, self.branches.padding_of(group), 0)
        return part.unflatten(1, (group.num_segments, group.num_steps))

    def put(self, group: Group, part: torch.Tensor, *, into: torch.Tensor) -> None:
        """Write a part [H, S, L, ...] to its nodes in `into` [N + 1, heads, ...]; heads of keys get their sum."""
        num_heads, heads = into.shape[1], torch.arange(into.shape[1], device=into.device)[:, None]
        if num_heads != len(part):
            part = part.float().unflatten(0, (num_heads, -1)).sum(1)
        places = self.branches.written_P[group.places] * num_heads + heads
        into.flatten(0, 1).index_copy_(0, places.flatten(), part.flatten(0, 2).to(into.dtype))


class _Part:
    """A group of segments, [H, S, L, ...] each: products in the dtype of the inputs, decays and sums in fp32."""

    def __init__(self, rows: _Rows, group: Group) -> None:
        self.group = group
        self.q, self.k, self.v, g, beta = (
            rows.take(x, group) for x in (rows.query, rows.key, rows.value, rows.g, rows.beta)
        )
        self.c = g.cumsum(-1)
        self.decay, self.left = self.c.exp(), (self.c[..., -1:] - self.c).exp()
        self.beta = beta
        upper = torch.ones(group.num_steps, group.num_steps, dtype=torch.bool, device=g.device).triu_(1)
        between = self.c[..., :, None] - self.c[..., None, :]
        self.between = between.masked_fill_(upper, -torch.inf).exp_()
        self.scores = (self.q @ self.k.mT).float().mul_(self.between)
        self.overlaps = (self.k @ self.k.mT).float().mul_(self.between)
        self.system = self.overlaps * beta[..., None]

    def with_states(self, x: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Return the products of x [H, S, L, A] with the states [H, P, A, B] that its segments begin in."""
        states = states.to(x.dtype)
        pieces = [
            (x[:, own.start : own.stop].flatten(1, 2) @ states[:, own.parent]).unflatten(1, (-1, x.shape[2]))
            for own in self.group.families
        ]
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]

    def corrections(self, states: torch.Tensor | None) -> torch.Tensor:
        """Return U [H, S, L, V]."""
        told = self.v.float()
        if states is not None:
            told = told - self.decay[..., None] * self.with_states(self.k, states)
        return self.solve(told.mul(self.beta[..., None])).to(self.v.dtype)

    def solve(self, x: torch.Tensor, *, is_transposed: bool = False) -> torch.Tensor:
        """Return (I + M)^-1 x, or (I + M)^-T x; the diagonal of `system` is not read."""
        system = self.system.mT if is_transposed else self.system
        solved: torch.Tensor = torch.linalg.solve_triangular(system, x, upper=is_transposed, unitriangular=True)
        return solved

    def answers(self, states: torch.Tensor | None, u: torch.Tensor) -> torch.Tensor:
        """Return the outputs [H, S, L, V]."""
        inside = self.scores.to(u.dtype) @ u
        return inside if states is None else inside + self.decay[..., None] * self.with_states(self.q, states)

    def end(self, states: torch.Tensor | None, u: torch.Tensor) -> torch.Tensor:
        """Return the states [H, S, K, V] at the end, in fp32 all the way: they are carried on."""
        written = (self.k * self.left[..., None]).mT @ u.float()
        if states is None:
            return written
        return written.addcmul_(states.index_select(1, self.group.parents_S), self.decay[..., -1, None, None])

    def gradients(
        self,
        grad: torch.Tensor,
        *,
        u: torch.Tensor,
        states: tuple[torch.Tensor | None, torch.Tensor | None],
        end: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """Return the gradients of q, k, v, g and beta for those of the outputs and of the ends.

        `states`: those to begin with, and where to add their gradients.
        """
        dtype, k, beta = u.dtype, self.k, self.beta[..., None]
        grad_u = self.scores.mT.to(dtype) @ grad
        if end is not None:
            grad_u = grad_u + (k * self.left[..., None]).to(dtype) @ end.to(dtype)
        grad_r = self.solve(grad_u.float(), is_transposed=True)
        narrow = grad_r.to(dtype)
        # Of the products inside: x through M, y through A.
        through_m = (narrow @ u.mT).float().mul_(self.between).neg_().tril_(-1)
        through_a = (grad @ u.mT).float().mul_(self.between)
        x, y = (through_m * beta).to(dtype), through_a.to(dtype)
        grad_q, grad_k = y @ k, y.mT @ self.q + (x + x.mT) @ k
        raw_k, raw_q = k @ k.mT, self.q @ k.mT
        # A step's decay lies between all that came before it and itself and all that comes behind.
        weighed = (x * raw_k + y * raw_q).float()
        grad_g = weighed.flip(-2).cumsum(-2).flip(-2).tril_(-1).sum(-1)
        grad_beta = torch.linalg.vecdot(grad_r, self.v.float()) + (through_m * raw_k).sum(-1)
        if end is not None:
            read = (u @ end.to(dtype).mT) * self.left[..., None]
            grad_k = grad_k + read
            told = torch.linalg.vecdot(read.float(), k.float())
            grad_g += told.cumsum(-1).sub_(told)
        if states[0] is not None and states[1] is not None:
            asked = self.with_states(grad, states[0].mT) * self.decay[..., None]
            told = self.with_states(narrow, states[0].mT) * self.decay[..., None]
            grad_q, grad_k = grad_q + asked, grad_k - beta * told
            told_k = torch.linalg.vecdot(told.float(), k.float())
            grad_beta.sub_(told_k)
            grad_c = torch.linalg.vecdot(asked.float(), self.q.float()).sub_(self.beta * told_k)
            grad_g += grad_c.flip(-1).cumsum(-1).flip(-1)
            self._add_to_states(grad, narrow, states=(states[0], states[1]), end=end, grad_g=grad_g)
        return grad_q, grad_k, beta * grad_r, grad_g, grad_beta

    def _add_to_states(
        self,
        grad: torch.Tensor,
        grad_r: torch.Tensor,
        *,
        states: tuple[torch.Tensor, torch.Tensor],
        end: torch.Tensor | None,
        grad_g: torch.Tensor,
    ) -> None:
        """Add the gradients of the states to begin with, and to `grad_g` that of what is left of them at the end."""
        dtype = grad.dtype
        q = (self.q * self.decay[..., None]).to(dtype)
        k = (self.k * (self.decay * self.beta)[..., None]).to(dtype)
        for own in self.group.families:
            here = slice(own.start, own.stop)
            asked, told = (x[:, here].flatten(1, 2).mT @ y[:, here].flatten(1, 2) for x, y in ((q, grad), (k, grad_r)))
            states[1][:, own.parent].add_(asked).sub_(told)
        if end is not None:
            left = self.decay[..., -1, None, None] * end
            begin = states[0].index_select(1, self.group.parents_S)
            grad_g += (left * begin).sum((-2, -1))[..., None]
            states[1].index_add_(1, self.group.parents_S, left)
