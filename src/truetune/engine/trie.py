"""Pairs → trie: common prefixes are merged, so that no token is computed twice. Numpy only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from truetune.records import Pair, Trie, first_difference


def count_trie_tokens(pairs: Iterable[Pair]) -> int:
    """Return how many tokens are left when common prefixes are counted once.

    Sorted sequences share with their neighbour all that they share with any earlier one:

        <sys> S A x      4 tokens
        <sys> S A y      1 new    (3 shared)
        <sys> T          1 new    (1 shared)
    """
    return count_prefixes(pair.prompt_ids + pair.answer_ids for pair in pairs)


def count_prefixes(sequences: Iterable[tuple[int, ...]]) -> int:
    """Return the same for sequences of ids: how many different prefixes they have."""
    previous: tuple[int, ...] = ()
    total = 0
    for ids in sorted(sequences):
        total += len(ids) - first_difference(previous, ids)
        previous = ids
    return total


def split_pairs(pairs: Sequence[Pair], max_tokens: int, *, scaled_from: int | None = None) -> list[list[Pair]]:
    """Split the pairs of a step into forwards of at most `max_tokens` nodes; pairs that share prefixes stay together.

    A pair longer than `max_tokens` has a forward of its own. `scaled_from`: pairs of more tokens than this change the
    rotary scaling of a whole forward (dynamic, longrope), so each of them runs alone.
    """
    forwards: list[list[Pair]] = []
    previous: tuple[int, ...] = ()
    room = 0
    for inputs, pair in sorted(((_inputs(pair), pair) for pair in pairs), key=lambda item: item[0]):
        is_alone = scaled_from is not None and len(inputs) > scaled_from
        num_new = len(inputs) - num_common(previous, inputs)
        if not forwards or num_new > room or is_alone:
            forwards.append([])
            room, num_new = max_tokens, len(inputs)
        forwards[-1].append(pair)
        room = -1 if is_alone else room - num_new
        previous = inputs
    return forwards


def build_trie(pairs: Sequence[Pair]) -> Trie:
    """Return the trie of `pairs`. A pair's last token is only predicted, so it makes no node."""
    ids: list[np.ndarray] = []
    paths: list[tuple[np.ndarray, int]] = []
    parents, targets = [], []
    ends = np.zeros(sum(map(len, pairs)), np.int64)
    nodes = inputs = np.zeros(0, np.int64)
    num_nodes = 0
    for _, pair in sorted(((_inputs(pair), pair) for pair in pairs), key=lambda item: item[0]):
        tokens = np.array(pair.prompt_ids + pair.answer_ids, np.int64)
        num_shared = num_common(inputs, tokens[:-1])
        ends[nodes[num_shared:]] = num_nodes
        inputs = tokens[:-1]
        num_new = len(inputs) - num_shared
        nodes = np.concatenate([nodes[:num_shared], np.arange(num_nodes, num_nodes + num_new)])
        if num_new:
            ids.append(inputs[num_shared:])
            paths.append((nodes, num_shared))
            num_nodes += num_new
        first = len(pair.prompt_ids) - 1
        parents.append(nodes[first:])
        targets.append(tokens[first + 1 :])
    ends[nodes] = num_nodes
    edges, weights_E = np.unique(
        np.stack([np.concatenate(parents), np.concatenate(targets)]), axis=1, return_counts=True
    )
    positions = [np.arange(num_shared, len(path)) for path, num_shared in paths]
    return Trie(
        np.concatenate(ids), np.concatenate(positions), ends[:num_nodes], tuple(paths), edges[0], edges[1], weights_E
    )


def path_of(trie: Trie, tokens: Sequence[int]) -> np.ndarray:
    """Return the nodes that read `tokens`, from the root on.

    The first child of node k is k + 1, the next one begins where it ends:

        ids   S  A  x  B  y         path of (S, B, y) = (0, 3, 4)
        ends  5  3  3  5  5

    Raises: ValueError if the trie does not hold them.
    """
    nodes = np.empty(len(tokens), np.int64)
    node = 0
    for depth, token in enumerate(tokens):
        while node < len(trie) and trie.token_ids_N[node] != token and trie.positions_N[node] == depth:
            node = int(trie.ends_N[node])
        if node >= len(trie) or trie.positions_N[node] != depth:
            raise ValueError(f"no such path in the trie: token {token} at depth {depth}")
        nodes[depth] = node
        node += 1
    return nodes


def _inputs(pair: Pair) -> tuple[int, ...]:
    """Return the tokens of a pair that the model reads."""
    return (pair.prompt_ids + pair.answer_ids)[:-1]


def num_common(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """Return how many tokens two sequences share from the start on.

    >>> num_common((1, 2, 3), (1, 2)), num_common((1, 2), (1, 5))
    (2, 1)
    """
    length = min(len(a), len(b))
    differs = np.asarray(a[:length]) != np.asarray(b[:length])
    return int(differs.argmax()) if differs.any() else length
