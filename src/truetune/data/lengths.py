"""The length policy: the only place where a row may go for its length. An answer is never cut."""

from __future__ import annotations

from collections.abc import Sequence

from truetune.errors import RowError
from truetune.records import Pair


def check_lengths(where: str, pairs: Sequence[Pair], *, max_length: int) -> None:
    """Refuse a row of which a pair is longer than `max_length` tokens.

    Raises: RowError with both numbers and the length that would fit.
    """
    longest = max(pairs, key=len)
    if len(longest) > max_length:
        raise RowError(
            "row_too_long",
            where=where,
            fix="row_too_long",
            length=len(longest),
            prompt=len(longest.prompt_ids),
            answer=len(longest.answer_ids),
            max_length=max_length,
        )
