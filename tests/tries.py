"""Random tries for tests of the engine, and a row's way through them."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from truetune.engine.trie import build_trie
from truetune.records import Pair, Trie


def random_trie(seed: int, *, num_pairs: int, length: int, num_ids: int = 3) -> Trie:
    """A trie of random pairs; few different ids make them share prefixes of many lengths, some twice the same."""
    draw = random.Random(seed)
    ids = [[draw.randrange(num_ids) for _ in range(draw.randint(2, length))] for _ in range(num_pairs)]
    return build_trie([Pair(tuple(some[:1]), tuple(some[1:])) for some in [*ids, ids[0]]])


def unlike_parents() -> Trie:
    """A trie in which parents of 1, 3 and 6 steps run together, one padded for another, and a chain of branchings."""
    rows = []
    for first, steps in ((30, 3), (40, 6), (50, 1)):
        stem = [1, 2, 3, *range(first, first + steps)]
        rows += [[*stem, 20], [*stem, 21, 22, 23, 24]]
    rows += [[1, 2, 3, 7, *[8] * depth, 9, 9, 9] for depth in range(1, 5)]
    return build_trie([Pair(tuple(row[:1]), (*row[1:], 0)) for row in rows])


def path_by_path(trie: Trie, run: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """Return what `run` makes of inputs [N, ...], each path from its root on as one row by itself, [T, ...]."""
    pieces = []
    for nodes, num_shared in trie.paths:
        rows = [x[torch.from_numpy(nodes)] for x in inputs]
        pieces.append(run(*rows)[num_shared:])
    return torch.cat(pieces)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return how far two tensors are apart, by norm."""
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-9))
