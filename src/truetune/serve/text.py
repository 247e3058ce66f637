"""Tokens → the text of a reply, piece by piece: whole characters, no stop string, thinking and tool calls apart.

tokens → Detokeniser → StopFinder → ReplyReader → (kind, text)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

OPEN_THINKING, CLOSE_THINKING = "<think>", "</think>"
OPEN_CALL, CLOSE_CALL = "<tool_call>", "</tool_call>"
HALF = "\ufffd"
"""What a decoder writes for bytes that are no character yet."""


class Detokeniser:
    """Gives text as soon as its bytes are whole characters. Pieces joined are the text of all tokens.

    ids      a b c d          a window from the last whole place on is decoded, so that a decoder which writes the
                 └┬┘          first word without its space (SentencePiece) does so at the start only
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._read = 0

    def add(self, token: int) -> str:
        """Return the text that a token completes."""
        self._ids.append(token)
        return self._new(is_last=False)

    def flush(self) -> str:
        """Return what is left: characters that were never completed."""
        return self._new(is_last=True)

    def _new(self, *, is_last: bool) -> str:
        before, now = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith(HALF) and not is_last):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class StopFinder:
    """Lets text through up to the first of some strings; what may be the start of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return (text to show, whether a stop string was found)."""
        text = self._held + text
        places = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if places:
            self._held = ""
            return text[: min(places)], True
        num_held = max((num_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def flush(self) -> str:
        """Return what waited."""
        held, self._held = self._held, ""
        return held


def num_begun(text: str, word: str) -> int:
    """Return how many of the last characters of `text` begin `word`, without being all of it.

    >>> num_begun("say <thi", "<think>"), num_begun("say", "<think>")
    (4, 0)
    """
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if word.startswith(text[-n:])), 0)


class ReplyReader:
    """Tells apart what a chat model thinks, says and calls. `opens_thinking`: the prompt ends inside its thinking.

    An empty thinking block is left out, as `truetune chat` leaves it out. `tool_names`: calls of others are text.
    """

    def __init__(self, *, opens_thinking: bool = False, tool_names: Sequence[str] = ()) -> None:
        self._state = self._thinking if opens_thinking else self._start
        self._text = ""
        self._tool_names = tool_names
        self._is_last = False
        self._has_called = self._has_thought = False
        self._gap = ""

    def add(self, text: str, *, is_last: bool = False) -> list[tuple[str, Any]]:
        """Return parts: ("reasoning", text), ("content", text), ("call", {"name", "arguments"})."""
        self._text += text
        self._is_last = is_last
        parts: list[tuple[str, Any]] = []
        before = None
        while before != (self._text, self._state):
            before = (self._text, self._state)
            parts += [(kind, value) for kind, value in self._state() if value]
        return parts

    def _start(self) -> Iterator[tuple[str, Any]]:
        text = self._text.lstrip()
        if text.startswith(OPEN_THINKING):
            self._text = text[len(OPEN_THINKING) :]
            self._state = self._thinking
        elif self._is_last or not OPEN_THINKING.startswith(text):
            self._state = self._content
        yield from ()

    def _thinking(self) -> Iterator[tuple[str, Any]]:
        self._text = self._text.lstrip("\n") if not self._has_thought else self._text
        thought, mark, behind = self._text.partition(CLOSE_THINKING)
        if mark:
            yield self._thought(thought.rstrip("\n"))
            self._text, self._state = behind, self._after_thinking
        elif self._is_last:
            yield self._thought(self._text)
            self._text = ""
        else:
            num_held = num_begun(self._text, CLOSE_THINKING)
            shown = self._text[: len(self._text) - num_held].rstrip("\n")
            self._text = self._text[len(shown) :]
            yield self._thought(shown)

    def _thought(self, text: str) -> tuple[str, str]:
        self._has_thought = self._has_thought or bool(text)
        return "reasoning", text

    def _after_thinking(self) -> Iterator[tuple[str, Any]]:
        self._text = self._text.lstrip("\n")
        if self._text:
            self._state = self._content
        yield from ()

    def _content(self) -> Iterator[tuple[str, Any]]:
        if not self._tool_names:
            text, self._text = self._text, ""
            yield "content", text
            return
        text, mark, behind = self._text.partition(OPEN_CALL)
        if mark:
            shown = text.rstrip()
            self._gap = text[len(shown) :]
            self._text, self._state = behind, self._call
            yield "content", shown
            return
        # White space waits: before and behind a call it is the call's.
        num_held = 0 if self._is_last else num_begun(text, OPEN_CALL)
        shown = text[: len(text) - num_held] if self._is_last else text[: len(text) - num_held].rstrip()
        self._text = text[len(shown) :]
        yield "content", self._trimmed(shown) if self._is_last else shown

    def _trimmed(self, text: str) -> str:
        return text if text.strip() or not self._has_called else ""

    def _call(self) -> Iterator[tuple[str, Any]]:
        body, mark, behind = self._text.partition(CLOSE_CALL)
        if not mark and not self._is_last:
            return
        call = read_call(body, self._tool_names) if mark else None
        self._text, self._state = behind, self._content
        if call is None:
            yield "content", f"{self._gap}{OPEN_CALL}{body}{mark}"
        else:
            self._has_called = True
            yield "call", call


def read_call(body: str, names: Sequence[str]) -> dict[str, str] | None:
    """Return name and arguments (JSON text) of a call as Qwen and Hermes write it, or None if it is none.

    >>> read_call('{"name": "f", "arguments": {"a": 1}}', ["f"])
    {'name': 'f', 'arguments': '{"a": 1}'}
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("name") not in names or not isinstance(value.get("arguments"), dict):
        return None
    return {"name": value["name"], "arguments": json.dumps(value["arguments"], ensure_ascii=False)}
