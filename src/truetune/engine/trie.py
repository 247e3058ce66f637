"""Common prefixes of pairs. Numpy and plain Python: nothing here loads torch."""

from __future__ import annotations

from collections.abc import Iterable

from truetune.records import Pair, first_difference


def count_trie_tokens(pairs: Iterable[Pair]) -> int:
    """Return how many tokens are left when common prefixes are counted once.

    Sorted sequences share with their neighbour all that they share with any earlier one:

        <sys> S A x      4 tokens
        <sys> S A y      1 new    (3 shared)
        <sys> T          1 new    (1 shared)
    """
    previous: tuple[int, ...] = ()
    total = 0
    for ids in sorted(pair.prompt_ids + pair.answer_ids for pair in pairs):
        total += len(ids) - first_difference(previous, ids)
        previous = ids
    return total
