"""The branches of a trie, for layers that carry a state from token to token: convolutions and linear attention.

A segment is an unbranched run of at most MAX_STEPS nodes, neighbours in the row. A wave holds the segments whose
parents are in the wave before, so that each one starts from the state in which its parent ended:

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

MAX_STEPS = 64
"""Steps that a recurrence computes at once, as in transformers: work inside grows with its square, states with 1/it."""
MAX_PADDING = 1.25
"""Places of a group, padding included, over its nodes: more would be computed for nothing."""
FREE_STEPS = 8
"""Steps that a group's longest segment may always have more than its shortest: a group of its own costs more."""


@dataclass(frozen=True)
class Siblings:
    """Neighbours in a group, from `start` to before `stop`, that begin in one state: the wave before's `parent`th."""

    start: int
    stop: int
    parent: int


@dataclass(frozen=True)
class Group:
    """Segments that run together, each `num_steps` long with its padding, from place `first` on.

    `families`: whose children they are; none for roots. `parents_S`: the same for each segment, as a tensor.
    `ends`: where, among the states that the wave hands on, those lie in which they end, (start, stop); None if nothing
    goes on from them.
    """

    num_segments: int
    num_steps: int
    first: int
    families: tuple[Siblings, ...]
    parents_S: torch.Tensor
    ends: tuple[int, int] | None

    @property
    def places(self) -> slice:
        """The places of the group."""
        return slice(self.first, self.first + self.num_segments * self.num_steps)


@dataclass(frozen=True)
class Branches:
    """A trie cut into waves of segments. N nodes, P places.

    `nodes_P`: the node at each place, any one where it is padding. `written_P`: the same, but N, a row past the last,
    where it is padding. `padding`: the places that are. `places_N`: the place of each node. `parents_N`: each node's
    parent, N for roots.
    """

    waves: tuple[tuple[Group, ...], ...]
    nodes_P: torch.Tensor
    written_P: torch.Tensor
    padding: torch.Tensor
    places_N: torch.Tensor
    parents_N: torch.Tensor
    _ancestors: list[torch.Tensor] = field(default_factory=list)

    @property
    def groups(self) -> Iterator[Group]:
        """Yield the groups in the order of their places."""
        for wave in self.waves:
            yield from wave

    def padding_of(self, group: Group) -> torch.Tensor:
        """Return which of a group's places are padding, counted from its first."""
        return (self.written_P[group.places] == len(self.parents_N)).nonzero()[:, 0]

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
    # Of each segment: its first node, its size, the segment it goes on from, and how many it has above it.
    firsts = _firsts(parents_N)
    sizes = np.diff(firsts, append=len(trie))
    segment_N = np.repeat(np.arange(len(firsts)), sizes)
    parents = np.where(parents_N[firsts] < 0, -1, segment_N[parents_N[firsts]])
    depths = np.zeros(len(firsts), np.int64)
    for segment, parent in enumerate(parents):
        depths[segment] = depths[parent] + 1 if parent >= 0 else 0
    is_parent = np.isin(np.arange(len(firsts)), parents)

    waves, nodes, first = [], [], 0
    handed_on = np.full(len(firsts), -1)
    for depth in range(depths.max() + 1):
        wave, num_ends = [], 0
        for members in _groups(np.flatnonzero(depths == depth), sizes, is_parent):
            members = members[np.argsort(parents[members], kind="stable")]
            steps = np.arange(sizes[members].max())[None]
            nodes.append(np.where(steps < sizes[members][:, None], firsts[members][:, None] + steps, -1).ravel())
            above = handed_on[parents[members]] if depth else np.zeros(0, np.int64)
            ends = None
            if is_parent[members[0]]:
                ends = (num_ends, num_ends + len(members))
                handed_on[members] = np.arange(*ends)
                num_ends += len(members)
            tables = (_families(above), torch.from_numpy(above).to(device), ends)
            wave.append(Group(len(members), steps.size, first, *tables))
            first += len(nodes[-1])
        waves.append(tuple(wave))
    nodes_P = np.concatenate(nodes)
    places_N = np.empty(len(trie), np.int64)
    (real,) = np.nonzero(nodes_P >= 0)
    places_N[nodes_P[real]] = real
    parents_N[parents_N < 0] = len(trie)
    written_P = np.where(nodes_P < 0, len(trie), nodes_P)
    arrays = (np.maximum(nodes_P, 0), written_P, np.flatnonzero(nodes_P < 0), places_N, parents_N)
    return Branches(tuple(waves), *(torch.from_numpy(array).to(device) for array in arrays))


def _families(parents: np.ndarray) -> tuple[Siblings, ...]:
    """Return the runs of equal parents."""
    starts = np.flatnonzero(np.diff(parents, prepend=-1)).tolist()
    return tuple(Siblings(a, b, int(parents[a])) for a, b in pairwise([*starts, len(parents)]))


def _parents(trie: Trie) -> np.ndarray:
    """Return the parent [N] of each node, -1 for roots."""
    parents_N = np.empty(len(trie), np.int64)
    for nodes, num_shared in trie.paths:
        parents_N[nodes[num_shared:]] = nodes[num_shared - 1 : -1] if num_shared else np.append(-1, nodes[:-1])
    return parents_N


def _firsts(parents_N: np.ndarray) -> np.ndarray:
    """Return the first node of each segment: a root, a node whose parent has other children, too, or MAX_STEPS on.

    A run of more steps is cut into pieces of like size, so that they need little padding.
    """
    num_children = np.bincount(parents_N[parents_N >= 0], minlength=len(parents_N))
    starts = np.flatnonzero((parents_N < 0) | (num_children[parents_N] > 1))
    sizes = np.diff(starts, append=len(parents_N))
    steps_N = np.arange(len(parents_N)) - np.repeat(starts, sizes)
    pieces_N = steps_N * np.repeat(-(-sizes // MAX_STEPS), sizes) // np.repeat(sizes, sizes)
    firsts: np.ndarray = np.flatnonzero((steps_N == 0) | (np.diff(pieces_N, prepend=0) > 0))
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
