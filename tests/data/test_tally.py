"""Counts of batches add up, and come back from the file they are kept in."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

from truetune.data.tally import Tally
from truetune.errors import RowError


def _tally(number: int) -> Tally:
    error = RowError("row_too_long", where=f"x:{number}", fix="row_too_long", length=number)
    names = Counter({"alpaca": number})
    return Tally(number, [error], names, Counter({f"key{number}": 1}), *range(number + 1, number + 5))


def test_batches_add_up() -> None:
    total = Tally()
    for number in (3, 1, 2):
        before = _tally(number)
        total += before
        assert vars(before).keys() == {field.name for field in fields(Tally)}
        assert before.num_read == number
    assert [error.where for error in total.refused] == ["x:3", "x:1", "x:2"]
    assert (total.num_read, total.num_cut, total.num_split) == (6, 9, 12)
    assert (total.num_added, total.num_empty_thinking) == (15, 18)
    assert (total.formats, total.ignored) == ({"alpaca": 6}, {"key1": 1, "key2": 1, "key3": 1})


def test_comes_back() -> None:
    tally = _tally(5)
    again = Tally.from_json(tally.to_json())
    (error,), (found,) = tally.refused, again.refused
    assert (found.key, found.where, found.fix, found.values) == (error.key, error.where, error.fix, {"length": "5"})
    again.refused = tally.refused
    assert again == tally
