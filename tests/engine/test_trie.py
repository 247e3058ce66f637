"""Shared prefixes, counted against a brute force."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from truetune.engine.trie import count_trie_tokens
from truetune.records import Pair


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
