"""Objects of the API: stream and whole are made of the same parts."""

from __future__ import annotations

import json
from typing import Any

from truetune.serve.replies import Choice, Reply
from truetune.serve.text import ReplyReader
from truetune.serve.worker import Piece

CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


def told(text: str, finish: str, **more: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(deltas of a stream, the whole choice) of a text that comes in pieces of 3 characters."""
    reply = Reply("m", True, 4, lambda ids: str(ids))
    reader = ReplyReader(tool_names=["f"], **more)
    choice = Choice(0, reply, reader=reader, num_logprobs=None)
    pieces = [Piece(text[at : at + 3], num_tokens=at + 1) for at in range(0, len(text), 3)]
    pieces.append(Piece("", num_tokens=len(text) + 1, finish=finish))
    parts = [part for piece in pieces for part in choice.add(piece)]
    assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
    whole = choice.whole()
    assert parts[-1]["finish_reason"] == whole["finish_reason"]
    assert reply.usage([choice]) == {
        "prompt_tokens": 4,
        "completion_tokens": len(text) + 1,
        "total_tokens": len(text) + 5,
    }
    return [part["delta"] for part in parts], whole


def test_thinking_has_its_own_field() -> None:
    deltas, whole = told("<think>\nHm.\n</think>\n\nYes.", "stop")
    assert whole["message"] == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    for name in ("content", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == whole["message"][name]


def test_tool_calls_are_parsed() -> None:
    deltas, whole = told(f"Look.\n{CALL}\n{CALL}", "stop")
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] == "Look."
    calls = whole["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [{"name": "f", "arguments": '{"a": 1}'}] * 2
    assert len({call["id"] for call in calls}) == 2
    streamed = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call.pop("index") for call in map(dict, streamed)] == [0, 1]
    assert [{key: call[key] for key in ("id", "type", "function")} for call in streamed] == calls


def test_a_cut_call_is_text_and_says_so() -> None:
    _, whole = told(CALL[:-6], "length")
    assert whole["finish_reason"] == "length"
    assert whole["message"]["content"] == CALL[:-6]
    assert "tool_calls" not in whole["message"]


def test_calls_alone_have_no_content() -> None:
    _, whole = told(CALL, "stop")
    assert whole["message"]["content"] is None


def test_an_event_is_one_line() -> None:
    reply = Reply("m", True, 4, str)
    event = reply.chunk([{"delta": {"content": "a\n\u2028b 你"}}])
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    assert json.loads(event.decode().removeprefix("data: "))["choices"][0]["delta"]["content"] == "a\n\u2028b 你"
