"""The length policy: a pair is either used whole or refused with all its numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from truetune.data.lengths import check_lengths, overlap_of, split_text
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


@settings(max_examples=300, deadline=None)
@given(
    num_tokens=st.integers(2, 200),
    max_length=st.integers(2, 40),
    begin=st.sampled_from([(), (1,)]),
)
def test_every_token_of_a_text_is_learned_once(num_tokens: int, max_length: int, begin: tuple[int, ...]) -> None:
    """In order, behind what stands before it, in pieces that are full but for the last; only bos is never learned."""
    assume(max_length > len(begin) + 1)
    text = tuple(range(100, 100 + num_tokens))
    ids = (*begin, *text)
    pieces = split_text(Pair(ids[:1], ids[1:], 1), max_length=max_length, begin=begin)
    learned = [token for piece in pieces for token in piece.answer_ids]
    assert learned == list(ids[1:])
    assert {len(piece) for piece in pieces[:-1]} <= {max_length}
    assert 2 <= len(pieces[-1]) <= max_length
    for piece in pieces:
        assert piece.prompt_ids[: len(begin)] == begin
        read = piece.prompt_ids[len(begin) :]
        before = text[: text.index(piece.answer_ids[0])]
        assert before[len(before) - len(read) :] == read
        assert len(read) == min(max(overlap_of(max_length), 1), len(before), max_length - len(begin) - 1)
    assert [piece.num_template_tokens for piece in pieces] == [0] * (len(pieces) - 1) + [1]


def test_the_drawing_of_a_split_text() -> None:
    text = Pair((1,), (*range(10, 19), 2))
    pieces = split_text(text, max_length=16, begin=(1,))
    assert pieces == [text]
    pieces = split_text(text, max_length=6, begin=(1,))
    assert [(piece.prompt_ids, piece.answer_ids) for piece in pieces] == [
        ((1,), (10, 11, 12, 13, 14)),
        ((1, 14), (15, 16, 17, 18)),
        ((1, 18), (2,)),
    ]
