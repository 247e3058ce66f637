"""Layers that carry a state along a row, over a trie: short convolutions, gated delta nets, state spaces.

transformers writes such a layer as projections around functions that mix tokens (`causal_conv1d_fn`,
`torch_chunk_gated_delta_rule`, ...), and those take the state to begin with. So the layer's own forward runs, with
functions in their place that go along the trie:

    convolution   a node and its nearest ancestors, instead of the tokens to its left in the row
    recurrence    each segment from the state in which the one before it ended (branches.py), gradients back through it

A layer that is fused gets another class, as in fused.py; without a trie its own forward computes, caches included.
Nothing here knows a model family: what a layer calls decides, and the comparison before step 1 proves it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from truetune.engine.branches import Branches
from truetune.engine.delta import delta_rule


class BranchingMixer(torch.nn.Module):
    """A layer that mixes tokens through the functions of `KERNELS`."""

    is_fused = True

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what the layer makes of hidden_states [1, N, D] along the trie of `trie_layout`, if there is one."""
        layout = kwargs.pop("trie_layout", None)
        if layout is None or not self.is_fused:
            out: torch.Tensor = super().forward(*args, **kwargs)
            return out
        own = inspect.unwrap(super().forward.__func__)
        helpers = own.__globals__
        kernels = {
            name: partial(kernel, layout.branches, helpers[name])
            for name, kernel in KERNELS.items()
            if name in own.__code__.co_names
        }
        along = FunctionType(own.__code__, helpers | kernels, own.__name__, own.__defaults__, own.__closure__)
        along.__kwdefaults__ = own.__kwdefaults__
        branched: torch.Tensor = along(self, *args, **kwargs)
        return branched


def is_mixer(layer: torch.nn.Module) -> bool:
    """Return whether a layer mixes tokens through functions that are known here."""
    return not KERNELS.keys().isdisjoint(_names(type(layer)))


def _names(kind: type[torch.nn.Module]) -> tuple[str, ...]:
    """Return what a layer's forward calls by name."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return () if code is None else code.co_names


def _convolve(
    branches: Branches,
    _own: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> torch.Tensor:
    """Return the causal convolution of hidden_states [1, D, N] by weight [D, K], as `causal_conv1d_fn` does."""
    out_ND = _Convolution.apply(hidden_states[0].T.to(weight.dtype), weight, branches)
    if bias is not None:
        out_ND = out_ND + bias
    if activation is not None:
        out_ND = ACT2FN[activation](out_ND)
    return out_ND.to(hidden_states.dtype).T[None]


class _Convolution(torch.autograd.Function):
    """out[n] = sum over lags of weight[:, K - 1 - lag] * x[ancestor of n by lag], summed in fp32."""

    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, weight: torch.Tensor, branches: Branches) -> torch.Tensor:
        ctx.save_for_backward(x_ND, weight)
        ctx.branches = branches
        x = F.pad(x_ND, (0, 0, 0, 1))
        out = torch.zeros(x_ND.shape, dtype=torch.float32, device=x.device)
        for lag, factor in enumerate(weight.float().T.flip(0)):
            out.addcmul_(x.index_select(0, branches.ancestors(lag)).float(), factor)
        return out.to(x_ND.dtype)

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_ND, weight = ctx.saved_tensors
        wide = grad_ND.float()
        grad_x = wide.new_zeros(len(x_ND) + 1, x_ND.shape[1])
        grad_weight = None
        for lag, factor in enumerate(weight.float().T.flip(0)):
            grad_x.index_add_(0, ctx.branches.ancestors(lag), wide * factor)
        if ctx.needs_input_grad[1]:
            x = F.pad(x_ND, (0, 0, 0, 1))
            rows = (x.index_select(0, ctx.branches.ancestors(lag)).float() for lag in range(weight.shape[1]))
            grad_weight = torch.stack([(row * wide).sum(0) for row in rows]).flip(0).T.to(weight.dtype)
        return grad_x[:-1].to(x_ND.dtype), grad_weight, None


class _Pack(torch.autograd.Function):
    """Rows of nodes → rows of places, zeros where they are padding."""

    @staticmethod
    def forward(ctx: Any, rows_N: torch.Tensor, branches: Branches) -> torch.Tensor:
        ctx.branches = branches
        return _packed(rows_N, branches)

    @staticmethod
    def backward(ctx: Any, grad_P: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_P.index_select(0, ctx.branches.places_N), None


class _Unpack(torch.autograd.Function):
    """Rows of places → rows of nodes."""

    @staticmethod
    def forward(ctx: Any, rows_P: torch.Tensor, branches: Branches) -> torch.Tensor:
        ctx.branches = branches
        return rows_P.index_select(0, branches.places_N)

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _packed(grad_N, ctx.branches), None


def _packed(rows_N: torch.Tensor, branches: Branches) -> torch.Tensor:
    return rows_N.index_select(0, branches.nodes_P).index_fill_(0, branches.padding, 0)


Run = Callable[[list[torch.Tensor], torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


def _scan(branches: Branches, run: Run, *inputs: torch.Tensor) -> torch.Tensor:
    """Return the output [1, N, ...] of a recurrence along a trie, of inputs [1, N, ...].

    `run`: (inputs [S, T, ...], the states to begin with or None) → (output [S, T, ...], the states at the end). Inputs
    of padding are zeros, and must leave the state as it is.
    """
    sizes = [group.num_segments * group.num_steps for group in branches.groups]
    pieces = zip(*(_Pack.apply(x[0], branches).split(sizes) for x in inputs), strict=True)
    outputs = []
    states: torch.Tensor | None = None
    for wave in branches.waves:
        ends = []
        for group in wave:
            rows = [piece.unflatten(0, (group.num_segments, group.num_steps)) for piece in next(pieces)]
            begin = None if states is None else states.index_select(0, group.parents_S)
            out, end = run(rows, begin)
            outputs.append(out.flatten(0, 1))
            if group.ends is not None:
                ends.append(end)
        states = torch.cat(ends) if ends else None
    out_N: torch.Tensor = _Unpack.apply(torch.cat(outputs), branches)
    return out_N[None]


def _scalar_delta_rule(
    branches: Branches,
    own: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The gated delta rule with one decay a head."""
    if not kwargs.get("use_qk_l2norm_in_kernel"):
        return _delta_rule(branches, own, query, key, value, **kwargs)
    inputs, gates = (query[0], key[0], value[0]), (kwargs["g"][0], kwargs["beta"][0])
    return delta_rule(inputs, gates, branches=branches)[None], None


def _delta_rule(
    branches: Branches,
    own: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The gated delta rule. Padding has g = 0 (nothing decays) and beta = 0 (nothing is written)."""
    g, beta = kwargs.pop("g"), kwargs.pop("beta")

    def run(rows: list[torch.Tensor], begin: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, g_ST, beta_ST = rows
        more = {"initial_state": begin, "output_final_state": True, "chunk_size": q.shape[1]}
        return own(q, k, v, **(kwargs | {"g": g_ST, "beta": beta_ST} | more))

    return _scan(branches, run, query, key, value, g, beta), None


def _state_space(
    branches: Branches,
    own: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    *maps: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """Mamba 2. Padding has a time step of 0; so bias, softplus and limits are applied before it is padded."""
    a, b, c = maps
    bias = kwargs.pop("dt_bias", None)
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    if kwargs.pop("dt_softplus", False):
        dt = F.softplus(dt)
    least, most = kwargs.pop("dt_limit", (0.0, float("inf")))
    dt = torch.clamp(dt, min=least, max=most)

    def run(rows: list[torch.Tensor], begin: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        x, dt_ST, b_ST, c_ST = rows
        more = {"initial_states": begin, "return_final_states": True, "chunk_size": x.shape[1]}
        return own(x, dt_ST, a, b_ST, c_ST, **(kwargs | more))

    return _scan(branches, run, hidden_states, dt, b, c)


def _not_at_once(*_: Any, **__: Any) -> None:
    """No kernel computes a whole layer along a trie: None leaves it to the layer's own parts."""


# What layers call (transformers 5.23) → what stands in its place: (branches, the layer's own function, its arguments).
KERNELS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolve,
    "torch_chunk_gated_delta_rule": _scalar_delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _state_space,
    "mamba2_split_conv1d_scan_combined": _not_at_once,
}
