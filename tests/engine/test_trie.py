"""Shared prefixes, nodes, edges and forwards, against a brute force."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from truetune.engine.trie import build_trie, count_trie_tokens, split_pairs
from truetune.records import Pair, Trie


def brute_force(pairs: list[Pair]) -> int:
    """The number of distinct non-empty prefixes: each is a node of the trie."""
    sequences = [pair.prompt_ids + pair.answer_ids for pair in pairs]
    return len({ids[:length] for ids in sequences for length in range(1, len(ids) + 1)})


def test_drawing_of_the_docstring() -> None:
    """Four tokens, then one new, then one new."""
    assert count_trie_tokens([Pair((1, 2), (3, 4)), Pair((1, 2), (3, 5)), Pair((1,), (9,))]) == 6


ids = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple)


@given(st.lists(st.builds(Pair, ids, ids), max_size=12))
def test_count_equals_the_number_of_distinct_prefixes(pairs: list[Pair]) -> None:
    """For random sequences over few tokens, duplicates and prefixes of each other included."""
    assert count_trie_tokens(pairs) == brute_force(pairs)


def prefix_of(trie: Trie, node: int) -> tuple[int, ...]:
    """The tokens from the root to a node, by intervals alone."""
    ancestors = [k for k in range(node + 1) if k <= node < trie.ends_N[k]]
    return tuple(trie.token_ids_N[ancestors].tolist())


@given(st.lists(st.builds(Pair, ids, ids), min_size=1, max_size=12))
def test_nodes_edges_and_paths_are_those_of_the_pairs(pairs: list[Pair]) -> None:
    """A node for each distinct prefix that is read, an edge for each distinct learned token, weighted by its pairs."""
    trie = build_trie(pairs)
    sequences = [pair.prompt_ids + pair.answer_ids for pair in pairs]
    read = {ids[:length] for ids in sequences for length in range(1, len(ids))}
    prefixes = [prefix_of(trie, node) for node in range(len(trie))]
    assert len(prefixes) == len(read) == len(set(prefixes))
    assert set(prefixes) == read
    assert trie.positions_N.tolist() == [len(prefix) - 1 for prefix in prefixes]
    learned = Counter(
        (ids[:at], ids[at])
        for pair, ids in zip(pairs, sequences, strict=True)
        for at in range(len(pair.prompt_ids), len(ids))
    )
    edges = zip(trie.parents_E.tolist(), trie.targets_E.tolist(), trie.weights_E.tolist(), strict=True)
    assert {(prefixes[parent], target): weight for parent, target, weight in edges} == learned
    own = [node for nodes, num_shared in trie.paths for node in nodes[num_shared:].tolist()]
    assert own == list(range(len(trie)))
    for nodes, _ in trie.paths:
        assert [prefixes[node] for node in nodes] == [prefixes[nodes[-1]][: n + 1] for n in range(len(nodes))]


@given(st.lists(st.builds(Pair, ids, ids), min_size=1, max_size=12), st.integers(1, 20), st.none() | st.integers(2, 8))
def test_forwards_hold_every_pair_once(pairs: list[Pair], max_tokens: int, scaled_from: int | None) -> None:
    """None is lost, none is too large unless one pair is, and pairs past the scaling threshold are alone."""
    forwards = split_pairs(pairs, max_tokens, scaled_from=scaled_from)
    as_ids = [(pair.prompt_ids, pair.answer_ids) for pair in pairs]
    assert sorted((p.prompt_ids, p.answer_ids) for forward in forwards for p in forward) == sorted(as_ids)
    for forward in forwards:
        alone = len({p.prompt_ids + p.answer_ids for p in forward}) == 1
        assert alone or len(build_trie(forward)) <= max_tokens
        longest = max(map(len, forward)) - 1
        assert scaled_from is None or longest <= scaled_from or len(forward) == 1


def test_pairs_that_share_stay_together() -> None:
    """Two families of pairs in any order make two forwards, with their prefixes computed once each."""
    pairs = [Pair((family, 2, 3, 4), (answer, 9)) for answer in (5, 6, 7) for family in (1, 8)]
    forwards = split_pairs(pairs, 8)
    assert [{pair.prompt_ids[0] for pair in forward} for forward in forwards] == [{1}, {8}]
    assert [len(build_trie(forward)) for forward in forwards] == [7, 7]
