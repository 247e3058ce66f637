"""The gated delta rule along a trie against transformers' loop over tokens, one path at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from tests.tries import difference, path_by_path, random_trie, unlike_parents
from truetune.engine import branches, delta
from truetune.engine.delta import delta_rule
from truetune.records import Trie

KEY_HEADS, HEADS, KEYS, VALUES = 2, 4, 6, 5
CPU = torch.device("cpu")
NAMES = ("out", "query", "key", "value", "g", "beta")


def tensors(trie: Trie, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key, value, g and beta at random; decays between none and all."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(KEY_HEADS, KEYS), (KEY_HEADS, KEYS), (HEADS, VALUES), (HEADS,), (HEADS,)]
    query, key, value, g, beta = (torch.randn(len(trie), *shape, generator=draw) for shape in shapes)
    return [x.to(dtype).requires_grad_() for x in (query, key, value, -g.exp(), beta.sigmoid())]


def along(trie: Trie, *x: torch.Tensor) -> torch.Tensor:
    return delta_rule((x[0], x[1], x[2]), (x[3], x[4]), branches=branches.cut(trie, CPU))


def by_tokens(trie: Trie, *x: torch.Tensor) -> torch.Tensor:
    def run(query: Any, key: Any, value: Any, g: Any, beta: Any) -> torch.Tensor:
        query, key = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (query, key))
        rows = (x[None] for x in (query, key, value))
        return torch_recurrent_gated_delta_rule(*rows, g=g[None], beta=beta[None], use_qk_l2norm_in_kernel=True)[0][0]

    return path_by_path(trie, run, *x)


def differences(trie: Trie, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """How far output and gradients are from the loop over tokens."""
    x = tensors(trie, dtype)
    weights = torch.randn(len(trie), HEADS, VALUES, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (along, by_tokens):
        out = function(trie, *x)
        results.append([out, *torch.autograd.grad((out * weights).sum(), x)])
    return {name: difference(a.float(), b.float()) for name, a, b in zip(NAMES, *results, strict=True)}


@pytest.mark.parametrize("max_steps", [1, 4, 64])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), num_pairs=st.integers(1, 9), length=st.integers(2, 20), num_ids=st.integers(1, 4))
def test_equals_one_path_at_a_time(max_steps: int, seed: int, num_pairs: int, length: int, num_ids: int) -> None:
    """Output and five gradients; deep chains of branchings, single tokens, duplicates, runs cut into pieces."""
    trie = random_trie(seed, num_pairs=num_pairs, length=length, num_ids=num_ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branches, "MAX_STEPS", max_steps)
        for name, found in differences(trie).items():
            assert found <= 2e-5, name


def branching() -> Trie:
    """Deep, and some of the parents are padded."""
    trie = unlike_parents()
    found = branches.cut(trie, CPU)
    assert len(found.waves) >= 5
    assert any(len(found.padding_of(group)) for group in found.groups if group.ends is not None)
    return trie


def test_half_precision_stays_near() -> None:
    """In bf16 products are rounded, states are not: a few times bf16's 2^-8, as in kernels for GPUs."""
    found = differences(branching(), torch.bfloat16)
    assert max(found.values()) <= 0.02, found


FAULTS = {
    "state at the padded end": (
        branches.Branches,
        "padding_of",
        lambda _self, _group: torch.zeros(0, dtype=torch.long),
    ),
    "gradient through the state cut": (delta._Part, "_add_to_states", lambda *_, **__: None),
    "state of another parent": (
        delta._Part,
        "with_states",
        lambda self, x, states: (x.flatten(1, 2) @ states[:, 0].to(x.dtype)).unflatten(1, x.shape[1:3]),
    ),
    "keys not normed": (delta, "_units", lambda query, key: (query, key)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trie = branching()
    assert max(differences(trie).values()) <= 2e-5
    monkeypatch.setattr(*FAULTS[fault])
    assert max(differences(trie).values()) > 1e-3


def test_a_branch_leaves_the_others_alone() -> None:
    """Other tokens in one leaf change nothing, to the bit, outside it."""
    trie = branching()
    x = [y.detach() for y in tensors(trie)]
    nodes, num_shared = trie.paths[-1]
    changed = [y.clone() for y in x]
    for y in changed:
        y[nodes[num_shared:]] *= 0.5
    others = [node for node in range(len(trie)) if node not in set(nodes[num_shared:].tolist())]
    before, after = along(trie, *x), along(trie, *changed)
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before, after)
