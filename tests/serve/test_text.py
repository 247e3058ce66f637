"""Text piece by piece: joined pieces are the whole, wherever it is cut."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from truetune.serve.text import Detokeniser, ReplyReader, StopFinder

TEXTS = ("Hé 你好，世界！ 🧑‍🚀👩‍👩‍👧 עברית \u2028 x\r\n\t end", "plain words", "𒀀𒁀 🏳️‍🌈")


@pytest.mark.parametrize("name", ["qwen_tokenizer", "smol_tokenizer"])
def test_pieces_are_whole_characters(name: str, request: pytest.FixtureRequest) -> None:
    """No piece holds half a character; ids drawn at random (mostly broken bytes) join to what they decode to."""
    tokenizer: Any = request.getfixturevalue(name)
    for text in TEXTS:
        words = Detokeniser(tokenizer)
        pieces = [words.add(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert "".join(pieces) + words.flush() == text
        assert "\ufffd" not in "".join(pieces)
        assert "" in pieces or text == TEXTS[1]
    chance = random.Random(0)
    for _ in range(200):
        ids = [chance.randrange(2000) for _ in range(chance.randrange(1, 12))]
        words = Detokeniser(tokenizer)
        assert "".join(map(words.add, ids)) + words.flush() == tokenizer.decode(ids, skip_special_tokens=True)


def cuts(text: str, count: int = 30) -> list[list[str]]:
    """Ways to cut a text: whole, each character, and at random."""
    chance = random.Random(1)
    ways = [[text], list(text)]
    for _ in range(count):
        places = sorted({0, len(text), *(chance.randrange(len(text) + 1) for _ in range(4))})
        ways.append([text[a:b] for a, b in itertools.pairwise(places)])
    return ways


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("no such", ["such!", "zz"], "no such"),
        ("你好。再见", ["。"], "你好"),
        ("end\n\nUser:", ["\n\nUser", "User:"], "end"),
        ("text", [], "text"),
    ],
)
def test_stop_strings_are_never_shown(text: str, stops: Sequence[str], shown: str) -> None:
    for way in cuts(text):
        finder, pieces, is_stopped = StopFinder(stops), [], False
        for part in way:
            piece, is_stopped = finder.add(part)
            pieces.append(piece)
            if is_stopped:
                break
        assert "".join(pieces) + finder.flush() == shown
        assert is_stopped == any(stop in text for stop in stops)


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "</x> 你"}}\n</tool_call>'
GIVEN = ("call", {"name": "f", "arguments": '{"a": "</x> 你"}'})
READ = [
    ("Hello there", False, [("content", "Hello there")]),
    ("<think>\n\n</think>\n\nHi", False, [("content", "Hi")]),
    (
        "<think>\nSo it is.\nYes\n</think>\n\nHi <think>",
        False,
        [("reasoning", "So it is.\nYes"), ("content", "Hi <think>")],
    ),
    ("<think>\ncut", False, [("reasoning", "cut")]),
    ("I see\n</think>\n\nHi", True, [("reasoning", "I see"), ("content", "Hi")]),
    ("<thin", False, [("content", "<thin")]),
    (CALL, False, [GIVEN]),
    (f"Let me look.\n{CALL}\n{CALL}", False, [("content", "Let me look."), GIVEN, GIVEN]),
    (f"<think>\n\n</think>\n\n{CALL}", False, [GIVEN]),
    ("<tool_call>{bad}</tool_call>", False, [("content", "<tool_call>{bad}</tool_call>")]),
    ('<tool_call>{"name": "g", "arguments": {}}</tool_call>', False, None),
    (
        f"Well \n<tool_call>{{bad}}</tool_call> and {CALL}",
        False,
        [("content", "Well \n<tool_call>{bad}</tool_call> and"), GIVEN],
    ),
    ("<tool_call>{", False, [("content", "<tool_call>{")]),
    ("", False, []),
]


@pytest.mark.parametrize(("text", "opens_thinking", "wanted"), READ)
def test_replies_are_read_the_same_wherever_they_are_cut(
    text: str, opens_thinking: bool, wanted: list[tuple[str, Any]] | None
) -> None:
    for way in cuts(text):
        reader = ReplyReader(opens_thinking=opens_thinking, tool_names=["f"])
        parts = [part for piece in way for part in reader.add(piece)] + reader.add("", is_last=True)
        joined: list[tuple[str, Any]] = []
        for kind, value in parts:
            if kind != "call" and joined and joined[-1][0] == kind:
                joined[-1] = (kind, joined[-1][1] + value)
            else:
                joined.append((kind, value))
        assert joined == ([("content", text)] if wanted is None else wanted)


def test_without_tools_a_call_is_text() -> None:
    assert ReplyReader().add(CALL, is_last=True) == [("content", CALL)]
