"""Requests: what is given arrives, what is wrong is named (tests/serve/test_app.py has the rest, over HTTP)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from truetune.messages import CATALOGUES, text
from truetune.serve.schema import NEUTRAL, ChatRequest, Refused, TextRequest, parse

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def chat(**more: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps(CHAT | more).encode())


def test_every_field_arrives() -> None:
    asked = chat(
        max_tokens=5, temperature=1, top_p=0.5, seed=-3, n=2, stop="a", logprobs=True, top_logprobs=4, user="u"
    )
    assert (asked.token_limit, asked.temperature, asked.top_p, asked.seed, asked.n) == (
        ("max_tokens", 5),
        1,
        0.5,
        -3,
        2,
    )
    assert (asked.stops, asked.num_logprobs) == (["a"], 4)
    assert chat(max_completion_tokens=7).token_limit == ("max_completion_tokens", 7)
    assert chat(logprobs=True).num_logprobs == 0
    assert chat().num_logprobs is None
    assert chat(stop=["a", "b"]).stops == ["a", "b"]
    assert chat(stream=True, stream_options={"include_usage": True}).has_usage
    assert chat().plain_messages() == CHAT["messages"]


def test_prompts_of_completions() -> None:
    for prompt, wanted in ("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]):
        request = parse(TextRequest, json.dumps({"model": "m", "prompt": prompt}).encode())
        assert request.prompts() == wanted


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_pass_and_others_do_not(name: str) -> None:
    for value in (*NEUTRAL[name], None):
        chat(**{name: value})
    for other in (7, "seven", [7], not NEUTRAL[name][0] if isinstance(NEUTRAL[name][0], bool) else True):
        with pytest.raises(Refused) as caught:
            chat(**{name: other})
        assert (caught.value.status, caught.value.param, caught.value.code) == (400, name, "unsupported_field")


def test_tools_and_tool_choice() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert chat(tools=[tool]).plain_tools() == [tool]
    assert chat(tools=[tool], tool_choice="auto").plain_tools() == [tool]
    assert chat(tools=[tool], tool_choice="none").plain_tools() == []


def test_every_refusal_has_its_text() -> None:
    keys = [key for key in CATALOGUES["en"] if key.startswith("api.")]
    assert len(keys) > 25
    for status, kind in ((400, "invalid_request_error"), (429, "rate_limit_error"), (503, "server_error")):
        assert Refused("busy", status=status).type == kind
    assert text("api.busy", "zh") != text("api.busy")
