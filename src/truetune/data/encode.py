"""Rendered text → token ids, many texts at once. What a user wrote as text never becomes a control token.

transformers marks control tokens in a user's text before it renders, and encodes what is marked as plain text
(`mark_control_tokens`, `encode_marked_chat` in transformers 5.23, utils/chat_template_utils.py:477). Texts without a
mark, nearly all, go through the Rust tokenizer in one call, which uses every core and lets other Python threads run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import RLock
from typing import Any

# Characters that transformers' markers use; a row that holds them itself would lose them.
MARKERS = re.compile("[\U000f0000\U000f0001]")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of one text. `encoding`: the Rust tokenizer's, if it was asked for places. `problem`: why there are none."""

    ids: list[int]
    encoding: Any = None
    problem: str = ""

    def num_tokens(self, start: int, stop: int) -> int | None:
        """Return how many tokens show the characters from `start` to before `stop`; None if that is not known."""
        if self.encoding is None:
            return None
        first, last = (self.encoding.char_to_token(at) for at in (start, stop - 1))
        return None if first is None or last is None else last - first + 1


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and the template whose control tokens it must not read in a user's text."""

    tokenizer: Any
    chat_template: str
    # transformers switches the Rust tokenizer for marked texts: nobody else may encode meanwhile.
    _lock: Any = field(default_factory=RLock, repr=False, compare=False)

    def encode(self, texts: Sequence[str], *, with_places: bool = False) -> list[Encoded]:
        """Return the ids of each text; `with_places`: and which characters they show. Any thread may call it."""
        plain = [number for number, text in enumerate(texts) if not MARKERS.search(text)] if self._backend else []
        found: list[Encoded | None] = [None] * len(texts)
        encodings = self._encode_plain([texts[number] for number in plain], with_places=with_places)
        for number, encoding in zip(plain, encodings, strict=True):
            found[number] = Encoded(encoding.ids, encoding if with_places else None)
        return [some or self._encode_one(text) for some, text in zip(found, texts, strict=True)]

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of one text by transformers' own code.

        Raises: ValueError if the tokenizer makes a control token of what a user wrote.
        """
        with self._lock:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)["input_ids"]
        return ids

    def _encode_one(self, text: str) -> Encoded:
        try:
            return Encoded(self.encode_marked(text))
        except ValueError as error:  # a token that this tokenizer makes of plain text, too
            return Encoded([], problem=str(error))

    def marked(self, value: Any) -> Any:
        """Return a text, or the texts inside a value, with control tokens marked, as the template is to see them."""
        from transformers.utils.chat_template_utils import mark_control_tokens

        return mark_control_tokens(value, self._control_tokens)

    def has_control_token(self, text: str) -> bool:
        """Return whether something in a text would be marked."""
        return bool(self._control_tokens.search(text))

    def _encode_plain(self, texts: list[str], *, with_places: bool) -> Iterable[Any]:
        if not texts:
            return []
        with self._lock:
            self._backend.encode_special_tokens = False
            encode = self._backend.encode_batch if with_places else self._backend.encode_batch_fast
            encodings: Iterable[Any] = encode(texts, add_special_tokens=False)
        return encodings

    @cached_property
    def _backend(self) -> Any:
        """The Rust tokenizer; None for a tokenizer without one."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_padding()
            backend.no_truncation()
        return backend

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        """Matches each control token. Private names of transformers 5.23: a test compares with its public path."""
        from transformers.utils.chat_template_utils import _get_control_token_patterns

        tokens = self.tokenizer._get_control_tokens(self.chat_template)
        pattern: re.Pattern[str] = _get_control_token_patterns(tokens)[0]
        return pattern
