"""The length policy: the only place where a row or a token may go for its length. An answer is never cut.

Plain text goes on where `max_length` ends: it is split, and nothing of it is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from truetune.data.template import Renderer
from truetune.data.turns import is_target
from truetune.errors import RowError
from truetune.records import Conversation, Message, Pair


def check_lengths(where: str, pairs: Sequence[Pair], *, max_length: int) -> None:
    """Refuse a row of which a pair is longer than `max_length` tokens.

    Raises: RowError with both numbers and the length that would fit.
    """
    longest = max(pairs, key=len)
    if len(longest) > max_length:
        prompt, answer = len(longest.prompt_ids), len(longest.answer_ids)
        values = {"length": len(longest), "prompt": prompt, "answer": answer, "max_length": max_length}
        raise RowError("row_too_long", where=where, fix="row_too_long", **values)


def cut_prompts(
    conversation: Conversation, pairs: Sequence[Pair], *, renderer: Renderer, max_length: int, last_turn_only: bool
) -> list[Pair]:
    """Return the pairs of a conversation, those longer than `max_length` with the oldest whole exchanges left out.

        system  user assistant  user assistant  user | assistant        too long
        system                  user assistant  user | assistant        rendered again: fits

    The system message stays, and so does the last user turn. Of a preference pair, both answers keep one prompt.

    Raises: RowError if what may not go is too long by itself.
    """
    targets = [number for number, message in enumerate(conversation.messages) if is_target(message)]
    if last_turn_only:
        targets = targets[-1:]
    fitting: list[Pair] = []
    for number, turn in enumerate(targets):
        is_last = number == len(targets) - 1
        part = replace(
            conversation,
            messages=conversation.messages[: turn + 1],
            rejected=conversation.rejected if is_last else (),
        )
        shorter = list(pairs[number:] if is_last else pairs[number : number + 1])
        while max(map(len, shorter)) > max_length:
            part = replace(part, messages=_without_oldest(part.messages), rejected=_without_oldest(part.rejected))
            if not part.messages:
                break
            shorter = renderer.pairs(part, last_turn_only=True)
        fitting += shorter
    check_lengths(conversation.where, fitting, max_length=max_length)
    return fitting


def _without_oldest(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages without the first user turn and all up to the next one; () if there is no next one."""
    users = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if len(users) < 2:
        return ()
    return (*messages[: int(messages[0]["role"] == "system")], *messages[users[1] :])


MIN_LENGTH = 2
"""Of a piece: a token that is learned, and one before it."""

OVERLAP_SHARE = 8
"""One part in so many of a piece is context: tokens of the piece before, read again and not learned again."""


def overlap_of(max_length: int) -> int:
    """Return how many tokens before a piece of plain text are read again."""
    return max(max_length // OVERLAP_SHARE, 1)


def split_text(pair: Pair, *, max_length: int, begin: tuple[int, ...]) -> list[Pair]:
    """Return the pieces of a text that is longer than `max_length` tokens; each token is learned in exactly one.

        text     <bos> a b c d e f g h i <eos>          max_length 6, 1 token of overlap
        piece 1  <bos> | a b c d e                      <bos> read, the rest learned
        piece 2  <bos> e | f g h i
        piece 3  <bos> i | <eos>

    As at inference, every piece begins with `begin`: the token bos, or nothing where the tokenizer writes none.
    """
    ids = pair.prompt_ids + pair.answer_ids
    overlap = min(overlap_of(max_length), max_length - len(begin) - 1)
    pieces, first = [], len(pair.prompt_ids)
    while first < len(ids):
        before = ids[:first] if first <= len(begin) + overlap else (*begin, *ids[first - overlap : first])
        stop = min(first + max_length - len(before), len(ids))
        is_last = stop == len(ids)
        pieces.append(Pair(before, ids[first:stop], pair.num_template_tokens if is_last else 0))
        first = stop
    return pieces
