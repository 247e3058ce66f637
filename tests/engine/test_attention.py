"""Attention along a trie against a dense mask of ancestors: forward, backward, blocks, windows, caps, FlexAttention."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    sliding_window_overlay,
)

from truetune.engine import attention
from truetune.engine.attention import Layout, UnsupportedError, trie_mask
from truetune.engine.trie import build_trie
from truetune.records import Pair, Trie

HEADS, GROUPS, SIZE = 4, 2, 8
CPU = torch.device("cpu")


def random_trie(seed: int, *, num_pairs: int, length: int, num_ids: int = 3) -> Trie:
    """A trie of random pairs; few different ids make them share prefixes of many lengths."""
    draw = random.Random(seed)
    ids = [[draw.randrange(num_ids) for _ in range(draw.randint(2, length))] for _ in range(num_pairs)]
    return build_trie([Pair(tuple(some[:1]), tuple(some[1:])) for some in ids])


def dense(trie: Trie, q: Any, k: Any, v: Any, *, window: int | None, softcap: float | None) -> torch.Tensor:
    """Softmax over all nodes with a mask of ancestors: the plain way. [N, heads, size]."""
    nodes = torch.arange(len(trie))
    ends, positions = torch.from_numpy(trie.ends_N), torch.from_numpy(trie.positions_N)
    is_seen = (nodes[None] <= nodes[:, None]) & (nodes[:, None] < ends[None])
    if window is not None:
        is_seen &= positions[:, None] - positions[None] < window
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~is_seen, -torch.inf).softmax(-1), v)


def tensors(trie: Trie, seed: int = 0) -> list[torch.Tensor]:
    """Random q, k, v in fp64, so that only mistakes differ."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(len(trie), heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def by_segments(trie: Trie, q: Any, k: Any, v: Any, *, window: int | None, softcap: float | None) -> torch.Tensor:
    """The engine's way."""
    core = attention._Core(Layout(trie, HEADS, CPU), window, 0.3, softcap, GROUPS)
    return attention._SegmentAttention.apply(q, k, v, core)


def assert_same(trie: Trie, *, window: int | None = None, softcap: float | None = None) -> None:
    """Outputs and gradients of both ways agree."""
    found, wanted = tensors(trie), tensors(trie)
    ours = by_segments(trie, *found, window=window, softcap=softcap)
    plain = dense(trie, *wanted, window=window, softcap=softcap)
    # The engine's probabilities are fp32, whatever q is.
    assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-6)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (ours * weights).sum().backward()
    (plain * weights).sum().backward()
    for one, other in zip(found, wanted, strict=True):
        assert float((one.grad - other.grad).norm()) <= 1e-5 * float(other.grad.norm()) + 1e-7


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_pairs=st.integers(1, 12),
    length=st.integers(2, 30),
    window=st.none() | st.integers(1, 12),
    softcap=st.none() | st.just(2.0),
)
def test_segments_equal_a_dense_mask(
    seed: int, num_pairs: int, length: int, window: int | None, softcap: float | None
) -> None:
    assert_same(random_trie(seed, num_pairs=num_pairs, length=length), window=window, softcap=softcap)


@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_kept_and_recomputed_probabilities_are_one(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the backward finds them or makes them again."""
    monkeypatch.setattr(attention, "KEPT_SCORES", kept)
    for window in (None, 6):
        assert_same(random_trie(11, num_pairs=12, length=40), window=window)


@pytest.mark.parametrize("window", [None, 5, 40])
def test_long_segments_go_in_blocks(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small limits make many chunks and blocks of one query upwards; the result is the same."""
    monkeypatch.setattr(attention, "MIN_QUERIES", 3)
    for scores in (64, 400, 5000):
        monkeypatch.setattr(attention, "CHUNK_SCORES", {"cpu": scores})
        trie = random_trie(3, num_pairs=9, length=70, num_ids=2)
        layout = Layout(trie, HEADS, CPU)
        assert len(layout.parts(window, has_kernel=False)[0]) > 3
        assert_same(trie, window=window)


@pytest.mark.parametrize(("window", "num_windowed"), [(None, 0), (60, 0), (45, 1)])
def test_long_segments_by_the_kernel(window: int | None, num_windowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long and short segments, with and without a shared path; paths past a window stay with the chunks."""
    monkeypatch.setattr(attention, "MIN_FLASH_QUERIES", 12)
    lengths = [(0, 40), (25, 20), (25, 3), (36, 20), (0, 5)]
    ids = [[9, *range(100, 100 + shared), *([n] * own)] for n, (shared, own) in enumerate(lengths)]
    trie = build_trie([Pair(tuple(some[:1]), tuple(some[1:])) for some in ids])
    chunks, long_segments = Layout(trie, HEADS, CPU).parts(window, has_kernel=True)
    written = torch.cat([chunk.written_nodes[chunk.written_nodes < len(trie)] for chunk in chunks])
    by_kernel = [node for segment in long_segments for node in range(segment.first, segment.stop)]
    assert sorted([*written.tolist(), *by_kernel]) == list(range(len(trie)))
    assert any(len(segment.shared_nodes) for segment in long_segments)
    assert len(long_segments) == 3 - num_windowed
    assert_same(trie, window=window)


def test_every_query_is_in_one_chunk() -> None:
    trie = random_trie(5, num_pairs=30, length=60)
    chunks, _ = Layout(trie, HEADS, CPU).parts(None, has_kernel=False)
    written = torch.cat([chunk.written_nodes for chunk in chunks])
    assert sorted(written[written < len(trie)].tolist()) == list(range(len(trie)))


def test_other_branches_are_never_seen() -> None:
    """Changing one branch leaves the others' outputs bit-equal: nothing leaks (E2)."""
    trie = build_trie([Pair((1, 2, 3), (4, 5, 6)), Pair((1, 2, 3), (7, 8, 9)), Pair((1, 9), (9, 9))])
    q, k, v = (x.detach() for x in tensors(trie))
    before = by_segments(trie, q, k, v, window=None, softcap=None)
    changed = 0
    for nodes, num_shared in trie.paths[1:]:
        own = nodes[num_shared:]
        k2, v2 = k.clone(), v.clone()
        k2[own], v2[own] = 99.0, -99.0
        after = by_segments(trie, q, k2, v2, window=None, softcap=None)
        others = np.setdiff1d(np.arange(len(trie)), own)
        assert torch.equal(after[others], before[others])
        changed += int(not torch.equal(after[own], before[own]))
    assert changed == 2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("window", [None, 4])
def test_flex_attention_gives_the_same_forward(window: int | None) -> None:
    """Its backward does not exist on a CPU in torch 2.13."""
    trie = random_trie(7, num_pairs=8, length=20)
    q, k, v = (x.detach().float() for x in tensors(trie))
    layout = Layout(trie, HEADS, CPU)
    arguments = {"scaling": 0.3, "trie_layout": layout, "softcap": 2.0}
    mask = torch.tensor(window or 0)
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    with torch.no_grad():
        flex, _ = attention._flex_attention(torch.nn.Module(), *heads_first, mask, **arguments)
    segments, _ = attention._segment_attention(torch.nn.Module(), *heads_first, mask, **arguments)
    assert flex.shape == segments.shape == (1, len(trie), HEADS, SIZE)
    assert torch.allclose(flex, segments, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("argument", ["s_aux", "position_bias", "dropout"])
def test_what_is_not_known_is_refused(argument: str) -> None:
    trie = random_trie(1, num_pairs=3, length=5)
    q, k, v = (x.detach().transpose(0, 1)[None] for x in tensors(trie))
    arguments = {"trie_layout": Layout(trie, HEADS, CPU), argument: 0.5}
    with pytest.raises(UnsupportedError, match=argument):
        attention._segment_attention(torch.nn.Module(), q, k, v, torch.tensor(0), **arguments)


MASKS = {
    "causal": (causal_mask_function, 0),
    "window": (and_masks(sliding_window_overlay(7), causal_mask_function), 7),
    "window as long as the row": (and_masks(sliding_window_overlay(30), causal_mask_function), 0),
    "window one shorter": (and_masks(sliding_window_overlay(29), causal_mask_function), 29),
    "chunks": (and_masks(chunked_overlay(8, torch.zeros(1, dtype=int)), causal_mask_function), None),
    "two ways": (or_masks(causal_mask_function, lambda b, h, q, k: k < 40), None),
}


@pytest.mark.parametrize("name", MASKS)
def test_window_is_read_off_the_models_own_mask(name: str) -> None:
    """Causal order and windows are understood, anything else is refused."""
    function, expected = MASKS[name]
    if expected is None:
        with pytest.raises(UnsupportedError):
            trie_mask(q_length=30, mask_function=function)
    else:
        assert trie_mask(q_length=30, mask_function=function).item() == expected
