"""The branches of a trie: every node in one place, every segment behind its parent, every ancestor found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tries import random_trie
from truetune.engine import branches as module
from truetune.engine.branches import Branches, cut
from truetune.engine.trie import build_trie
from truetune.records import Pair, Trie

CPU = torch.device("cpu")


def segments(found: Branches) -> list[list[list[int]]]:
    """The nodes of each segment, without padding, by wave."""
    waves = []
    for wave in found.waves:
        waves.append([])
        for group in wave:
            nodes = found.written_P[group.places].view(group.num_segments, group.num_steps)
            waves[-1] += [[int(node) for node in row if node < len(found.parents_N)] for row in nodes]
    return waves


def pair(*ids: int) -> Pair:
    """A pair that reads `ids`: the last token is only predicted."""
    return Pair(ids[:1], (*ids[1:], 0))


def test_the_drawing() -> None:
    """The trie that the module draws."""
    trie = build_trie([pair(1, 2, 3, 4, 5), pair(1, 2, 3, 6, 7, 8), pair(1, 2, 3, 6, 9)])
    found = cut(trie, CPU)
    assert segments(found) == [[[0, 1, 2]], [[5], [3, 4]], [[8], [6, 7]]]
    assert [[group.parents_S.tolist() for group in wave] for wave in found.waves] == [[[]], [[0], [0]], [[0, 0]]]
    assert [[group.ends for group in wave] for wave in found.waves] == [[(0, 1)], [(0, 1), None], [None]]
    assert found.padding.tolist() == [7]
    assert [found.ancestors(lag).tolist() for lag in (0, 1, 3)] == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [9, 0, 1, 2, 3, 2, 5, 6, 5],
        [9, 9, 9, 0, 1, 0, 1, 2, 1],
    ]


def check(trie: Trie, max_steps: int) -> int:
    """Compare the branches with the paths of the trie; return how many segments there are."""
    found = cut(trie, CPU)
    ancestors = {}
    for nodes, _ in trie.paths:
        for depth, node in enumerate(nodes.tolist()):
            ancestors[node] = nodes[: depth + 1].tolist()
    waves = segments(found)
    flat = [node for wave in waves for segment in wave for node in segment]
    assert sorted(flat) == list(range(len(trie)))
    assert torch.equal(found.nodes_P[found.places_N], torch.arange(len(trie)))
    assert len(found.padding) == len(found.nodes_P) - len(trie)
    for lag in range(4):
        wanted = [ancestors[node][-1 - lag] if len(ancestors[node]) > lag else len(trie) for node in range(len(trie))]
        assert found.ancestors(lag).tolist() == wanted
    handed_on: list[int] = []
    for wave, rows in zip(found.waves, waves, strict=True):
        rows, ends = iter(rows), []
        for group in wave:
            assert [(s.stop - s.start) for s in group.families] == np.diff(
                [s.start for s in group.families] + [group.num_segments] * bool(group.families)
            ).tolist()
            for place, segment in zip(range(group.num_segments), rows, strict=False):
                assert 1 <= len(segment) <= min(group.num_steps, max_steps)
                above = ancestors[segment[0]][:-1]
                assert above[-1:] == ([handed_on[group.parents_S[place]]] if group.families else [])
                assert ancestors[segment[-1]] == above + segment
                ends += [segment[-1]] if group.ends is not None else []
            for family in group.families:
                assert set(group.parents_S[family.start : family.stop].tolist()) == {family.parent}
        handed_on = ends
    return sum(len(wave) for wave in waves)


@pytest.mark.parametrize("max_steps", [1, 3, 64])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), num_pairs=st.integers(1, 12), length=st.integers(2, 30), num_ids=st.integers(1, 4))
def test_random_tries(max_steps: int, seed: int, num_pairs: int, length: int, num_ids: int) -> None:
    trie = random_trie(seed, num_pairs=num_pairs, length=length, num_ids=num_ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_STEPS", max_steps)
        assert check(trie, max_steps) >= len(trie) / max_steps


def test_a_long_run_is_cut_evenly() -> None:
    trie = build_trie([pair(*range(1, 101))])
    assert [[len(segment) for segment in wave] for wave in segments(cut(trie, CPU))] == [[50], [50]]


def test_little_is_padded() -> None:
    """Padding stays below a quarter of the nodes where segments are long."""
    trie = build_trie([pair(1, *[100 * row + step for step in range(20 + row)]) for row in range(1, 40)])
    found = cut(trie, CPU)
    assert len(found.nodes_P) <= module.MAX_PADDING * len(trie)
    assert max(len(wave) for wave in found.waves) <= 4
