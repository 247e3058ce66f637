"""Pieces of answers → OpenAI's objects, whole or as a stream; both are made of the same parts."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from truetune.serve.sampler import Scored
from truetune.serve.text import HALF, ReplyReader
from truetune.serve.worker import STOP, Piece

TOOL_CALLS = "tool_calls"


@dataclass
class Reply:
    """What all objects of one answer share. `decode`: ids → text."""

    model: str
    is_chat: bool
    num_prompt_tokens: int
    decode: Any
    has_usage: bool = False
    made: int = field(default_factory=lambda: int(time.time()))
    name: str = ""

    def __post_init__(self) -> None:
        self.name = ("chatcmpl-" if self.is_chat else "cmpl-") + secrets.token_hex(12)

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the object that is sent at once."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._object(kind, [choice.whole() for choice in choices]) | {"usage": self.usage(choices)}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        """Return an event of a stream."""
        told = self._object("chat.completion.chunk" if self.is_chat else "text_completion", choices)
        return event(told | ({"usage": usage} if self.has_usage else {}))

    def usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        """Return how many tokens were read and made; the stop token was made, too."""
        made = sum(choice.num_tokens for choice in choices)
        read = self.num_prompt_tokens
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.name, "object": kind, "created": self.made, "model": self.model, "choices": choices}


def event(value: dict[str, Any]) -> bytes:
    """Return a server-sent event; its JSON is one line of valid UTF-8."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


class Choice:
    """One answer of a reply, as it grows. `reader`: None for plain text."""

    def __init__(self, index: int, reply: Reply, *, reader: ReplyReader | None, num_logprobs: int | None) -> None:
        self.index, self.num_tokens, self.finish = index, 0, ""
        self._reply, self._reader, self._num_logprobs = reply, reader, num_logprobs
        self._texts: dict[str, list[str]] = {"content": [], "reasoning_content": []}
        self._calls: list[dict[str, Any]] = []
        self._scored: list[Scored] = []

    def first(self) -> dict[str, Any]:
        """Return the part of a chunk that begins a chat answer."""
        return self._part({"role": "assistant", "content": ""}, (), None)

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        """Take a piece; return the parts of chunks that tell of it."""
        self.num_tokens = piece.num_tokens
        is_last = piece.finish is not None
        deltas = self._deltas(piece.text, is_last=is_last)
        self._scored += piece.scored
        if is_last:
            self.finish = TOOL_CALLS if self._calls and piece.finish == STOP else str(piece.finish)
        if not deltas and not piece.scored and not is_last:
            return []
        deltas = deltas or [{} if self._reader else {"text": ""}]
        last = len(deltas) - 1
        return [
            self._part(delta, piece.scored if at == 0 else (), self.finish if is_last and at == last else None)
            for at, delta in enumerate(deltas)
        ]

    def whole(self) -> dict[str, Any]:
        """Return the whole choice."""
        content, reasoning = ("".join(self._texts[name]) for name in ("content", "reasoning_content"))
        told: dict[str, Any] = {"index": self.index, "finish_reason": self.finish, "logprobs": self._told(self._scored)}
        if self._reader is None:
            return told | {"text": content}
        message: dict[str, Any] = {"role": "assistant", "content": None if self._calls and not content else content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if self._calls:
            message["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in self._calls]
        return told | {"message": message}

    def _deltas(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        if self._reader is None:
            self._texts["content"].append(text)
            return [{"text": text}] if text else []
        deltas: list[dict[str, Any]] = []
        for kind, value in self._reader.add(text, is_last=is_last):
            if kind == "call":
                name = f"call_{secrets.token_hex(12)}"
                self._calls.append({"index": len(self._calls), "id": name, "type": "function", "function": value})
                deltas.append({"tool_calls": [self._calls[-1]]})
                continue
            field_name = "reasoning_content" if kind == "reasoning" else kind
            self._texts[field_name].append(value)
            deltas.append({field_name: value})
        return deltas

    def _part(self, delta: dict[str, Any], scored: Sequence[Scored], finish: str | None) -> dict[str, Any]:
        told = {"index": self.index, "logprobs": self._told(scored) if scored else None, "finish_reason": finish}
        return told | (delta if self._reader is None else {"delta": delta})

    def _told(self, scored: Sequence[Scored]) -> dict[str, Any] | None:
        if self._num_logprobs is None:
            return None
        if self._reader is None:
            return self._told_of_text(scored)
        content = []
        for some in scored:
            likeliest = [self._token(token, logprob) for token, logprob in some.likeliest]
            content.append(self._token(some.token, some.logprob) | {"top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def _told_of_text(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """The older form, of /v1/completions."""
        words = [self._reply.decode([some.token]) for some in scored]
        likeliest = [{self._reply.decode([token]): value for token, value in some.likeliest} for some in scored]
        return {"tokens": words, "token_logprobs": [some.logprob for some in scored], "top_logprobs": likeliest}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        """A token that is a part of a character has no bytes of its own in JSON's text: null, as the API has it."""
        text = self._reply.decode([token])
        return {"token": text, "logprob": logprob, "bytes": None if HALF in text else list(text.encode())}
