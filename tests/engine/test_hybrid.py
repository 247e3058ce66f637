"""Convolutions and recurrences along a trie against transformers' own functions, one path at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.bamba.modeling_bamba import mamba2_chunk_scan
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import causal_conv1d_fn, torch_chunk_gated_delta_rule

from tests.tries import difference, path_by_path, random_trie, unlike_parents
from truetune.engine import hybrid
from truetune.engine.branches import Branches, cut
from truetune.engine.trie import build_trie
from truetune.records import Pair, Trie

CPU = torch.device("cpu")
TRIES = {"seed": st.integers(0, 10**6), "num_pairs": st.integers(1, 9), "length": st.integers(2, 16)}
WIDTH = 4


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(out: torch.Tensor, *x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of a random sum of it."""
    return [out, *torch.autograd.grad((out * normal(*out.shape, seed=9)).sum(), x)]


def largest_difference(trie: Trie, name: str) -> float:
    """How far output and gradients of one of hybrid.KERNELS are from the function that it stands in for."""
    x, along, alone = CASES[name](trie, cut(trie, CPU))
    x = [y.requires_grad_() for y in x]
    found, wanted = gradients(along(*x), *x), gradients(path_by_path_of(trie, alone, x), *x)
    assert len(found) == len(x) + 1 >= 3
    return max(difference(a, b) for a, b in zip(found, wanted, strict=True))


def path_by_path_of(trie: Trie, alone: Any, x: list[torch.Tensor]) -> torch.Tensor:
    """Inputs that tokens bring go path by path, others (weights) as they are."""
    tokens = [y for y in x if len(y) == len(trie)]
    others = [y for y in x if len(y) != len(trie)]
    return path_by_path(trie, lambda *rows: alone(*rows, *others), *tokens)


def convolution(trie: Trie, branches: Branches) -> Any:
    size = len(trie) + 7  # no other tensor has as many rows as the trie
    x, weight, bias = normal(len(trie), size), normal(size, WIDTH, seed=1), normal(size, seed=2)

    def alone(row: Any, weight: Any, bias: Any) -> torch.Tensor:
        return causal_conv1d_fn(row.T[None], weight, bias, activation="silu")[0].T

    def along(x: Any, weight: Any, bias: Any) -> torch.Tensor:
        return hybrid._convolve(branches, causal_conv1d_fn, x.T[None], weight, bias, activation="silu")[0].T

    return (x, weight, bias), along, alone


def kimi(trie: Trie, branches: Branches) -> Any:
    n, heads, size = len(trie), 2, 5
    x = [normal(n, heads, size, seed=seed) for seed in range(3)]
    x += [-normal(n, heads, size, seed=3).exp(), normal(n, heads, seed=4).sigmoid()]

    def run(function: Any, q: Any, k: Any, v: Any, g: Any, beta: Any) -> torch.Tensor:
        rows, gates = (y[None] for y in (q, k, v)), {"g": g[None], "beta": beta[None]}
        return function(*rows, **gates, use_qk_l2norm_in_kernel=True)[0][0]

    def along(*x: Any) -> torch.Tensor:
        return run(lambda *a, **b: hybrid._delta_rule(branches, chunk_kimi_delta_attention, *a, **b), *x)

    return x, along, lambda *x: run(chunk_kimi_delta_attention, *x)


def gated(trie: Trie, branches: Branches) -> Any:
    """Without normed keys the scalar rule goes through the layer's own function, too."""
    x, _, _ = kimi(trie, branches)
    x[3] = -normal(len(trie), 2, seed=3).exp()
    x[1] = torch.nn.functional.normalize(x[1], dim=-1)

    def run(function: Any, q: Any, k: Any, v: Any, g: Any, beta: Any) -> torch.Tensor:
        return function(q[None], k[None], v[None], g=g[None], beta=beta[None])[0][0]

    def along(*x: Any) -> torch.Tensor:
        return run(lambda *a, **b: hybrid._scalar_delta_rule(branches, torch_chunk_gated_delta_rule, *a, **b), *x)

    return x, along, lambda *x: run(torch_chunk_gated_delta_rule, *x)


def mamba(trie: Trie, branches: Branches) -> Any:
    n, heads, size, groups, state = len(trie), 4, 5, 2, 3
    x = [normal(n, heads, size), normal(n, heads, seed=1)]
    x += [normal(n, groups, state, seed=seed) for seed in (2, 3)]
    a, skip, bias = -normal(heads, seed=4).exp(), normal(heads, seed=5), normal(heads, seed=6)
    more = {"chunk_size": 8, "D": skip, "dt_bias": bias, "dt_softplus": True, "dt_limit": (0.01, 2.0)}

    def run(function: Any, x: Any, dt: Any, b: Any, c: Any) -> torch.Tensor:
        return function(x[None], dt[None], a, b[None], c[None], **more)[0]

    def along(*x: Any) -> torch.Tensor:
        return run(lambda *y, **z: hybrid._state_space(branches, mamba2_chunk_scan, *y, **z), *x)

    return x, along, lambda *x: run(mamba2_chunk_scan, *x)


CASES = {"convolution": convolution, "kimi": kimi, "gated": gated, "mamba": mamba}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=8, deadline=None)
@given(**TRIES)
def test_equals_one_path_at_a_time(name: str, seed: int, num_pairs: int, length: int) -> None:
    """Branches within a convolution's width of the root and of each other, single tokens, duplicates."""
    trie = random_trie(seed, num_pairs=num_pairs, length=length)
    assert largest_difference(trie, name) <= 2e-5


def test_every_kernel_is_compared() -> None:
    tested = {hybrid._convolve, hybrid._delta_rule, hybrid._scalar_delta_rule, hybrid._state_space}
    assert tested | {hybrid._not_at_once} == set(hybrid.KERNELS.values())


def branching() -> Trie:
    """Deep, and some of the parents are padded."""
    trie = unlike_parents()
    found = cut(trie, CPU)
    assert len(found.waves) >= 5
    assert any(len(found.padding_of(group)) for group in found.groups if group.ends is not None)
    return trie


def left_neighbour(self: Branches, lag: int) -> torch.Tensor:
    nodes = torch.arange(len(self.parents_N)) - lag
    return torch.where(nodes < 0, len(self.parents_N), nodes)


FAULTS = {
    "convolution reads its left neighbour": ("convolution", Branches, "ancestors", left_neighbour),
    "state at the padded end": ("mamba", hybrid, "_packed", lambda x, branches: x.index_select(0, branches.nodes_P)),
    "state at the padded end of a delta": ("kimi", hybrid, "_packed", lambda x, b: x.index_select(0, b.nodes_P)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *patch = FAULTS[fault]
    trie = branching()
    assert largest_difference(trie, name) <= 2e-5
    monkeypatch.setattr(*patch)
    assert largest_difference(trie, name) > 1e-3


@pytest.mark.parametrize("name", ["kimi", "mamba"])
def test_a_cut_gradient_through_the_state_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trie, select = branching(), torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda x, *where: select(x.detach(), *where))
    assert largest_difference(trie, name) > 1e-3


def test_a_layer_without_a_trie_is_its_own() -> None:
    """Without a trie, or switched off, nothing of the layer's own forward is replaced."""
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    from truetune.engine.attention import Layout
    from truetune.engine.fused import fuse, use_fused

    layer = Lfm2ShortConv(Lfm2Config(hidden_size=8, layer_types=["conv"], num_hidden_layers=1), 0)
    x = normal(1, 5, 8)
    wanted = layer(x)
    assert fuse(layer) == 1
    assert list(layer.state_dict()) == ["conv.weight", "in_proj.weight", "out_proj.weight"]
    layout = Layout(build_trie([Pair((1, 2), (3, 4)), Pair((1, 2), (5, 6))]), 1, CPU)
    assert len(layout.trie) == 4
    assert torch.equal(layer(x), wanted)
    use_fused(layer, is_fused=False)
    assert torch.equal(layer(x[:, :4], trie_layout=layout), wanted[:, :4])
    use_fused(layer, is_fused=True)
    branched = layer(x[:, :4], trie_layout=layout)
    assert difference(branched[0, :3], wanted[0, :3]) <= 1e-6
    assert difference(branched[0, 3], layer(x[:, [0, 1, 3]])[0, 2]) <= 1e-6
