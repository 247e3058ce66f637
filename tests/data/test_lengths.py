"""The length policy: a pair is either used whole or refused with all its numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from truetune.data.lengths import check_lengths
from truetune.errors import RowError
from truetune.records import Pair

WHERE = "rows.json:3"


def _pair(prompt: int, answer: int) -> Pair:
    return Pair(tuple(range(prompt)), tuple(range(answer)))


def _is_refused(pairs: list[Pair], max_length: int) -> bool:
    try:
        check_lengths(WHERE, pairs, max_length=max_length)
    except RowError:
        return True
    return False


@pytest.mark.parametrize(
    "sizes",
    [[(6, 4)], [(1, 9)], [(9, 1)], [(2, 2), (6, 4)], [(6, 4), (2, 2)], [(5, 5), (9, 1), (3, 6)], [(4, 6)] * 3],
)
def test_at_below_and_above_the_limit(sizes: list[tuple[int, int]]) -> None:
    pairs = [_pair(*size) for size in sizes]
    assert max(prompt + answer for prompt, answer in sizes) == 10
    refused = [max_length for max_length in range(1, 20) if _is_refused(pairs, max_length)]
    assert refused == list(range(1, 10))


@pytest.mark.parametrize(("prompt", "answer"), [(6, 5), (1, 10), (10, 1), (300, 700)])
def test_the_refusal_names_all_numbers(prompt: int, answer: int, assert_fault: Callable[..., None]) -> None:
    with pytest.raises(RowError) as caught:
        check_lengths(WHERE, [_pair(2, 2), _pair(prompt, answer), _pair(3, 1)], max_length=10)
    numbers = {"length": prompt + answer, "prompt": prompt, "answer": answer, "max_length": 10}
    assert_fault(caught.value, "row_too_long", where=WHERE, **numbers)
    assert f"--max-length {prompt + answer};" in str(caught.value)


def test_the_length_that_is_named_fits() -> None:
    pairs = [_pair(2, 2), _pair(8, 7), _pair(9, 2)]
    with pytest.raises(RowError) as caught:
        check_lengths(WHERE, pairs, max_length=4)
    check_lengths(WHERE, pairs, max_length=caught.value.values["length"])
    assert _is_refused(pairs, caught.value.values["length"] - 1)
