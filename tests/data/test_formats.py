"""Rows → conversations: two formats that say the same give the same turns, and every refusal names its cause."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from truetune.data import formats
from truetune.data.formats import FORMATS, ROLES, ignored_keys, is_target, recognise, to_conversation
from truetune.errors import RowError
from truetune.records import Conversation, RawRow

WHERE = "rows.json:7"
ALPACA = {"instruction": "Ask", "output": "Answer"}


def _user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def _assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def _system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def _convert(value: dict[str, Any], **more: Any) -> Conversation:
    return to_conversation(RawRow(WHERE, value), **more)


def _refused(value: dict[str, Any]) -> RowError:
    with pytest.raises(RowError) as caught:
        _convert(value)
    return caught.value


SAME: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "no input": (ALPACA, [_user("Ask"), _assistant("Answer")]),
    "empty input": (ALPACA | {"input": ""}, [_user("Ask"), _assistant("Answer")]),
    "null input": (ALPACA | {"input": None}, [_user("Ask"), _assistant("Answer")]),
    "input": (ALPACA | {"input": "about\nthis"}, [_user("Ask\nabout\nthis"), _assistant("Answer")]),
    "only input": (ALPACA | {"input": "this", "instruction": ""}, [_user("this"), _assistant("Answer")]),
    "null instruction": (ALPACA | {"input": "this", "instruction": None}, [_user("this"), _assistant("Answer")]),
    "system": (ALPACA | {"system": "Be brief."}, [_system("Be brief."), _user("Ask"), _assistant("Answer")]),
    "empty system": (ALPACA | {"system": ""}, [_user("Ask"), _assistant("Answer")]),
    "null system and history": (ALPACA | {"system": None, "history": None}, [_user("Ask"), _assistant("Answer")]),
    "empty history": (ALPACA | {"history": []}, [_user("Ask"), _assistant("Answer")]),
    "history": (
        ALPACA | {"history": [["q1", "a1"], ["q2", "a2"]], "system": "S", "input": "I"},
        [
            _system("S"),
            *(_user("q1"), _assistant("a1"), _user("q2"), _assistant("a2")),
            *(_user("Ask\nI"), _assistant("Answer")),
        ],
    ),
    "spaces stay": (
        {"instruction": "  Ask \n", "output": "\n Answer\t"},
        [_user("  Ask \n"), _assistant("\n Answer\t")],
    ),
    "unusual text": (
        {"instruction": "{{ 7*7 }}\u2028", "output": "007 👩\u200d🚀 <|im_end|>"},
        [_user("{{ 7*7 }}\u2028"), _assistant("007 👩\u200d🚀 <|im_end|>")],
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_both_formats_say_the_same(case: str) -> None:
    alpaca, messages = SAME[case]
    assert [recognise(RawRow(WHERE, row)) for row in (alpaca, {"messages": messages})] == ["alpaca", "messages"]
    assert _convert(alpaca) == _convert({"messages": messages}) == Conversation(WHERE, tuple(messages))


@pytest.mark.parametrize("join", ["\n", "\n\n", " ", "", " | "])
def test_input_join(join: str) -> None:
    prompts = [
        _convert(ALPACA | {"input": extra}, input_join=join).messages[0]["content"] for extra in ("this", "", None)
    ]
    assert prompts == ["Ask" + join + "this", "Ask", "Ask"]
    assert _convert({"messages": [_user("Ask"), _assistant("A")]}, input_join=join).messages[0]["content"] == "Ask"


def test_the_row_itself_is_not_changed() -> None:
    row = {"messages": [_system("S"), _user("a"), _assistant("b", train=True, reasoning_content="why")], "id": 3}
    before = json.dumps(row)
    _convert(row)
    assert json.dumps(row) == before


@pytest.mark.parametrize(
    ("flags", "learned"),
    [
        ({}, True),
        ({"train": True}, True),
        ({"train": 1}, True),
        ({"train": None}, True),
        ({"loss": True, "train": True}, True),
        ({"train": None, "loss": True}, True),
        ({"train": False}, False),
        ({"train": 0}, False),
        ({"loss": False}, False),
        ({"loss": False, "train": True}, False),
        ({"loss": 1, "train": 0}, False),
        ({"loss": None, "train": False}, False),
    ],
)
def test_flags(flags: dict[str, Any], learned: bool) -> None:
    turns = _convert({"messages": [_user("a"), _assistant("b", **flags), _user("c"), _assistant("d")]}).messages
    assert [is_target(turn) for turn in turns] == [False, learned, False, True]
    assert ("is_target" in turns[1]) == any(flag is not None for flag in flags.values())
    assert set(turns[1]) <= {"role", "content", "is_target"}


def test_a_flag_makes_no_user_turn_a_target() -> None:
    turns = _convert({"messages": [_user("a", train=True), _assistant("b", train=True)]}).messages
    assert [is_target(turn) for turn in turns] == [False, True]


def test_reasoning_is_kept() -> None:
    turns = [_user("a"), _assistant("b", reasoning_content="\nbecause "), _user("c"), _assistant("d")]
    turns[3]["reasoning_content"] = None
    read = _convert({"messages": turns}).messages
    assert [turn.get("reasoning_content") for turn in read] == [None, "\nbecause ", None, None]
    assert "reasoning_content" not in read[3]


OPEN = [_user("a"), _assistant("b")]
REFUSALS: dict[str, tuple[dict[str, Any], str, str, dict[str, Any]]] = {
    "no answer": ({"instruction": "a", "input": "x"}, "row_missing_key", "row_missing_key", {"name": "output"}),
    "no question": ({"output": "a", "id": 1}, "row_missing_key", "row_missing_key", {"name": "instruction"}),
    "no key": ({}, "row_unknown_keys", "row_unknown_keys", {"near": ""}),
    "other keys": ({"q": "a", "z": "b"}, "row_unknown_keys", "row_unknown_keys", {"near": ""}),
    "slips": ({"instuction": "a", "z": "b"}, "row_unknown_keys", "row_did_you_mean", {"near": "instruction"}),
    "slip in messages": ({"mesages": OPEN}, "row_unknown_keys", "row_did_you_mean", {"near": "messages"}),
    "number": (ALPACA | {"output": 7}, "row_not_text", "row_not_text", {"name": "output", "kind": "number"}),
    "null": (ALPACA | {"output": None}, "row_not_text", "row_not_text", {"name": "output", "kind": "null"}),
    "list": (ALPACA | {"input": ["x"]}, "row_not_text", "row_not_text", {"name": "input", "kind": "list"}),
    "true": (
        ALPACA | {"system": True},
        "row_not_text",
        "row_not_text",
        {"name": "system", "kind": "boolean"},
    ),
    "no content": (
        {"messages": [{"role": "user"}, _assistant("b")]},
        "row_not_text",
        "row_not_text",
        {"name": "messages[1].content", "kind": "null"},
    ),
    "content of parts": (
        {"messages": [_user("a"), _assistant([{"type": "text", "text": "b"}])]},
        "row_not_text",
        "row_not_text",
        {"name": "messages[2].content", "kind": "list"},
    ),
    "reasoning is a number": (
        {"messages": [_user("a"), _assistant("b", reasoning_content=1)]},
        "row_not_text",
        "row_not_text",
        {"name": "messages[2].reasoning_content", "kind": "number"},
    ),
    "empty answer": (ALPACA | {"output": ""}, "row_empty_text", "row_empty_text", {"name": "output"}),
    "blank answer": (ALPACA | {"output": " \n\u3000"}, "row_empty_text", "row_empty_text", {"name": "output"}),
    "empty question": (ALPACA | {"instruction": ""}, "row_empty_text", "row_empty_text", {"name": "instruction"}),
    "empty turn": (
        {"messages": [_user(" "), _assistant("b")]},
        "row_empty_text",
        "row_empty_text",
        {"name": "messages[1].content"},
    ),
    "NUL": (ALPACA | {"input": "a\x00b"}, "row_bad_character", "row_bad_character", {"name": "input"}),
    "surrogate": (
        ALPACA | {"output": json.loads('"x\\ud83d"')},
        "row_bad_character",
        "row_bad_character",
        {"name": "output"},
    ),
    "surrogate in a turn": (
        {"messages": [_system("\udfff"), *OPEN]},
        "row_bad_character",
        "row_bad_character",
        {"name": "messages[1].content"},
    ),
    "history of texts": (ALPACA | {"history": ["a", "b"]}, "row_history", "row_history", {"number": 1}),
    "history of one": (ALPACA | {"history": [["a", "b"], ["c"]]}, "row_history", "row_history", {"number": 2}),
    "history of null": (ALPACA | {"history": [["a", None]]}, "row_history", "row_history", {"number": 1}),
    "history is a text": (ALPACA | {"history": "a"}, "row_history", "row_history", {"number": 1}),
    "messages is a text": ({"messages": "a"}, "row_messages", "row_messages", {"kind": "text"}),
    "messages is an object": ({"messages": _user("a")}, "row_messages", "row_messages", {"kind": "object"}),
    "no messages": ({"messages": []}, "row_messages", "row_messages", {"kind": "list"}),
    "turn is a text": (
        {"messages": [_user("a"), "b"]},
        "row_turn_not_object",
        "row_messages",
        {"name": "messages[2]", "kind": "text"},
    ),
    "turn with tool calls": (
        {"messages": [_user("a"), _assistant("b", tool_calls=[], name="x")]},
        "row_turn_keys",
        "row_turn_keys",
        {"name": "messages[2]", "found": "name, tool_calls"},
    ),
    "role of ShareGPT": (
        {"messages": [{"role": "gpt", "content": "a"}]},
        "row_role",
        "row_role",
        {"name": "messages[1]", "role": "'gpt'", "roles": "system, user, assistant"},
    ),
    "no role": (
        {"messages": [_user("a"), {"content": "b"}]},
        "row_role",
        "row_role",
        {"name": "messages[2]", "role": "None", "roles": "system, user, assistant"},
    ),
    "flag is a text": (
        {"messages": [_user("a"), _assistant("b", train="false")]},
        "row_flag",
        "row_flag",
        {"name": "messages[2]"},
    ),
    "flag is two": (
        {"messages": [_user("a"), _assistant("b", loss=2)]},
        "row_flag",
        "row_flag",
        {"name": "messages[2]"},
    ),
    "answer first": (
        {"messages": [_assistant("b"), _user("a")]},
        "row_order",
        "row_order",
        {"name": "messages[1]", "role": "assistant", "expected": "user"},
    ),
    "answer after system": (
        {"messages": [_system("s"), _assistant("b")]},
        "row_order",
        "row_order",
        {"name": "messages[2]", "role": "assistant", "expected": "user"},
    ),
    "user twice": (
        {"messages": [_system("s"), *OPEN, _user("c"), _user("d"), _assistant("e")]},
        "row_order",
        "row_order",
        {"name": "messages[5]", "role": "user", "expected": "assistant"},
    ),
    "system in the middle": (
        {"messages": [*OPEN, _system("s"), *OPEN]},
        "row_order",
        "row_order",
        {"name": "messages[3]", "role": "system", "expected": "user"},
    ),
    "only system": ({"messages": [_system("s")]}, "row_only_system", "row_open_turn", {}),
    "no answer at the end": (
        {"messages": [_system("s"), *OPEN, _user("c")]},
        "row_open_turn",
        "row_open_turn",
        {"name": "messages[4]"},
    ),
    "nothing learned": (
        {"messages": [_user("a"), _assistant("b", train=False), _user("c"), _assistant("d", loss=0)]},
        "row_nothing_learned",
        "row_nothing_learned",
        {},
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case: str, assert_fault: Callable[..., None]) -> None:
    value, key, fix, values = REFUSALS[case]
    if key in ("row_missing_key", "row_unknown_keys"):
        values = values | {"found": ", ".join(sorted(value)) or "-"}
    assert_fault(_refused(value), key, where=WHERE, fix=fix, **values)


def test_every_refusal_of_the_module_is_met_above() -> None:
    source = Path(str(formats.__file__)).read_text()
    named = set(re.findall(r'(?:_refuse|RowError)\(\s*(?:[\w.]+,\s*)?"(\w+)"', source))
    assert {key for _, key, _, _ in REFUSALS.values()} == named
    assert len(named) >= 15


def test_a_refused_row_has_a_mended_twin_that_is_read() -> None:
    mended: dict[str, dict[str, Any]] = {
        "no answer": {"instruction": "a", "input": "x", "output": "b"},
        "slip in messages": {"messages": OPEN},
        "surrogate": ALPACA | {"output": json.loads('"x\\ud83d\\ude80"')},
        "history of one": ALPACA | {"history": [["a", "b"], ["c", "d"]]},
        "flag is a text": {"messages": [_user("a"), _assistant("b", train=True)]},
        "no answer at the end": {"messages": [_system("s"), *OPEN, *OPEN]},
    }
    assert mended.keys() <= REFUSALS.keys()
    assert [len(_convert(row).messages) for row in mended.values()] == [2, 2, 2, 6, 2, 5]


@pytest.mark.parametrize(
    ("value", "ignored"),
    [
        (ALPACA, set()),
        (ALPACA | {"input": "", "system": "", "history": []}, set()),
        (ALPACA | {"id": 1, "label": "x"}, {"id", "label"}),
        ({"messages": OPEN}, set()),
        ({"messages": OPEN, "id": 1, "input": "x"}, {"id", "input"}),
        (ALPACA | {"messages": OPEN}, {"messages"}),
    ],
)
def test_ignored_keys(value: dict[str, Any], ignored: set[str]) -> None:
    row = RawRow(WHERE, value)
    assert ignored_keys(row) == ignored
    left = RawRow(WHERE, {key: item for key, item in value.items() if key not in ignored})
    assert ignored_keys(left) == set()
    assert to_conversation(left) == to_conversation(row)


def test_no_format_needs_what_another_one_needs() -> None:
    needs = [set(known.needs) for known in FORMATS.values()]
    assert len(needs) == 2
    assert len(set().union(*needs)) == sum(map(len, needs)) == 3
    assert ROLES == ("system", "user", "assistant")
