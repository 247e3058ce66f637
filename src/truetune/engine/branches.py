"""The branches of a trie, for layers that carry a state from token to token: convolutions and linear attention.

A segment is an unbranched run of nodes, neighbours in the row. A wave holds the segments whose parents are in the wave
before, so that each one starts from the state in which its parent ended:

    trie      0 1 2 ─┬─ 3 4          segments   a = 0 1 2    b = 3 4    c = 5    d = 6 7    e = 8
                     └─ 5 ─┬─ 6 7    waves      (a)  (b c)  (d e)
                           └─ 8      parents     -    a a    c c

The segments of a wave run in groups of like length, padded on the right by steps that leave the state as it is. All
groups lie one behind the other; a place is a row there:

    places    0 1 2 | 5 | 3 4 | 8 . 6 7         (. = padding)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from truetune.records import Trie

MAX_PADDING = 1.25
"""Places of a group, padding included, over its nodes: more would be computed for nothing."""
FREE_STEPS = 8
"""Steps that a group's longest segment may always have more than its shortest: a group of its own costs more."""


@dataclass(frozen=True)
class Group:
    """Segments that run together, each `num_steps` long with its padding.

    `parents_S`: the place of each one's parent among the states that the wave before handed on; None for roots.
    `is_parent`: whether the states in which they end are handed on, in their order.
    """

    num_segments: int
    num_steps: int
    parents_S: torch.Tensor | None
    is_parent: bool


@dataclass(frozen=True)
class Branches:
    """A trie cut into waves of segments. P is the number of places.

    `nodes_P`: the node at each place, any one where it is padding. `padding`: the places that are. `places_N`: the
    place of each node. `parents_N`: each node's parent; N, a row past the last, for roots.
    """

    waves: tuple[tuple[Group, ...], ...]
    nodes_P: torch.Tensor
    padding: torch.Tensor
    places_N: torch.Tensor
    parents_N: torch.Tensor
    _ancestors: list[torch.Tensor] = field(default_factory=list)

    @property
    def groups(self) -> Iterator[Group]:
        """Yield the groups in the order of their places."""
        for wave in self.waves:
            yield from wave

    def ancestors(self, lag: int) -> torch.Tensor:
        """Return the node [N] that lies `lag` tokens before each one on its path; N where the path begins later."""
        size = len(self.parents_N)
        if not self._ancestors:
            self._ancestors.append(torch.arange(size, device=self.parents_N.device))
        beyond = self.parents_N.new_full((1,), size)
        while len(self._ancestors) <= lag:
            self._ancestors.append(torch.cat([self.parents_N, beyond])[self._ancestors[-1]])
        return self._ancestors[lag]


def cut(trie: Trie, device: torch.device) -> Branches:
    """Return the branches of a trie, index tables on `device`."""
    parents_N = _parents(trie)
    # Of each segment: its first node, its size, the segment that it leaves, and how many it has above it.
    firsts = _firsts(parents_N)
    sizes = np.diff(firsts, append=len(trie))
    segment_N = np.repeat(np.arange(len(firsts)), sizes)
    parents = np.where(parents_N[firsts] < 0, -1, segment_N[parents_N[firsts]])
    depths = np.zeros(len(firsts), np.int64)
    for segment, parent in enumerate(parents):
        depths[segment] = depths[parent] + 1 if parent >= 0 else 0
    is_parent = np.isin(np.arange(len(firsts)), parents)

    waves, nodes = [], []
    handed_on = np.full(len(firsts), -1)
    for depth in range(depths.max() + 1):
        wave, num_parents = [], 0
        for members in _groups(np.flatnonzero(depths == depth), sizes, is_parent):
            steps = np.arange(sizes[members].max())[None]
            nodes.append(np.where(steps < sizes[members][:, None], firsts[members][:, None] + steps, -1).ravel())
            above = None if depth == 0 else torch.from_numpy(handed_on[parents[members]]).to(device)
            wave.append(Group(len(members), steps.size, above, bool(is_parent[members[0]])))
            if wave[-1].is_parent:
                handed_on[members] = np.arange(num_parents, num_parents + len(members))
                num_parents += len(members)
        waves.append(tuple(wave))
    nodes_P = np.concatenate(nodes)
    places_N = np.empty(len(trie), np.int64)
    (real,) = np.nonzero(nodes_P >= 0)
    places_N[nodes_P[real]] = real
    tables = (np.maximum(nodes_P, 0), np.flatnonzero(nodes_P < 0), places_N)
    parents_N[parents_N < 0] = len(trie)
    return Branches(tuple(waves), *(torch.from_numpy(table).to(device) for table in (*tables, parents_N)))


def _parents(trie: Trie) -> np.ndarray:
    """Return the parent [N] of each node, -1 for roots."""
    parents_N = np.empty(len(trie), np.int64)
    for nodes, num_shared in trie.paths:
        parents_N[nodes[num_shared:]] = nodes[num_shared - 1 : -1] if num_shared else np.append(-1, nodes[:-1])
    return parents_N


def _firsts(parents_N: np.ndarray) -> np.ndarray:
    """Return the first node of each segment: a root, or a node whose parent has other children, too."""
    num_children = np.bincount(parents_N[parents_N >= 0], minlength=len(parents_N))
    firsts: np.ndarray = np.flatnonzero((parents_N < 0) | (num_children[parents_N] > 1))
    return firsts


def _groups(segments: np.ndarray, sizes: np.ndarray, is_parent: np.ndarray) -> Iterator[np.ndarray]:
    """Yield groups of like length; those whose states are handed on are apart from those whose are not."""
    for is_kept in (True, False):
        members = segments[is_parent[segments] == is_kept]
        members = members[np.argsort(sizes[members], kind="stable")]
        starts = _starts(sizes[members])
        yield from (members[start:stop] for start, stop in pairwise([*starts, len(members)]))


def _starts(sizes: Sequence[int] | np.ndarray) -> list[int]:
    """Return where groups begin among ascending sizes."""
    starts: list[int] = []
    for place, size in enumerate(sizes):
        if not starts or size > max(sizes[starts[-1]] * MAX_PADDING, sizes[starts[-1]] + FREE_STEPS):
            starts.append(place)
    return starts
