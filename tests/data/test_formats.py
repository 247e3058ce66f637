"""Rows → conversations: two formats that say the same give the same turns, and every refusal names its cause."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from truetune.data import formats, turns
from truetune.data.formats import FORMATS, ignored_keys, recognise, to_conversation
from truetune.data.turns import is_target
from truetune.errors import RowError
from truetune.records import Conversation, RawRow

WHERE = "rows.json:7"
ALPACA = {"instruction": "Ask", "output": "Answer"}


def _user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def _assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def _call(name: str, arguments: Any, content: Any = None) -> dict[str, Any]:
    return _assistant(content, tool_calls=[{"function": {"name": name, "arguments": arguments}}])


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
    "rows inside": (
        {"version": 1, "data": [ALPACA, ALPACA]},
        "row_nested",
        "row_nested",
        {"name": "data", "count": 2},
    ),
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
    "messages is a text": ({"messages": "a"}, "row_messages", "row_messages", {"name": "messages", "kind": "text"}),
    "messages is an object": (
        {"messages": _user("a")},
        "row_messages",
        "row_messages",
        {"name": "messages", "kind": "object"},
    ),
    "no messages": ({"messages": []}, "row_messages", "row_messages", {"name": "messages", "kind": "list"}),
    "turn is a text": (
        {"messages": [_user("a"), "b"]},
        "row_turn_not_object",
        "row_messages",
        {"name": "messages[2]", "kind": "text"},
    ),
    "turn with other keys": (
        {"messages": [_user("a", tool_calls=[]), _assistant("b")]},
        "row_turn_keys",
        "row_turn_keys",
        {"name": "messages[1]", "found": "tool_calls"},
    ),
    "role of ShareGPT": (
        {"messages": [{"role": "gpt", "content": "a"}]},
        "row_role",
        "row_role",
        {"name": "messages[1]", "role": "'gpt'", "roles": "system, user, assistant, tool", "near": "gpt"},
    ),
    "role in capitals": (
        {"messages": [{"role": "User ", "content": "a"}, _assistant("b")]},
        "row_role",
        "row_role_case",
        {"name": "messages[1]", "role": "'User '", "roles": "system, user, assistant, tool", "near": "user"},
    ),
    "role that ShareGPT does not know": (
        {"conversations": [{"from": "me", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "row_role",
        "row_role",
        {"name": "conversations[1]", "role": "'me'", "roles": ", ".join(turns.SHAREGPT_ROLES), "near": ""},
    ),
    "call without a result": (
        {"messages": [_user("a"), _call("f", "{}"), _user("b"), _assistant("c")]},
        "row_tool_without_result",
        "row_tool_without_result",
        {"name": "messages[3]", "role": "user", "expected": "tool"},
    ),
    "arguments that are no JSON": (
        {"messages": [_user("a"), _call("f", "{x}")]},
        "row_tool_arguments",
        "row_tool_arguments",
        {
            "name": "messages[2].tool_calls[1].arguments",
            "problem": "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        },
    ),
    "arguments that are a list": (
        {"messages": [_user("a"), _call("f", "[1]")]},
        "row_tool_arguments",
        "row_tool_arguments",
        {"name": "messages[2].tool_calls[1].arguments", "problem": "list"},
    ),
    "call without a name": (
        {"messages": [_user("a"), _assistant(None, tool_calls=[{"function": {"arguments": {}}}])]},
        "row_tool_call",
        "row_tool_call",
        {"name": "messages[2].tool_calls[1]", "kind": "object"},
    ),
    "calls that are no list": (
        {"messages": [_user("a"), _assistant(None, tool_calls="f")]},
        "row_tool_call",
        "row_tool_call",
        {"name": "messages[2].tool_calls", "kind": "text"},
    ),
    "call of an unknown tool": (
        {"messages": [_user("a"), _call("g", "{}")], "tools": [{"function": {"name": "f"}}]},
        "row_tool_unknown",
        "row_tool_unknown",
        {"name": "messages[2]", "tool": "g", "known": "f"},
    ),
    "tools without names": (
        {"messages": OPEN, "tools": [{"function": {}}]},
        "row_tools",
        "row_tools",
        {"name": "tools[1]", "kind": "object"},
    ),
    "tools that are no list": (
        {"messages": OPEN, "tools": '{"name": "f"}'},
        "row_tools",
        "row_tools",
        {"name": "tools", "kind": "object"},
    ),
    "the same answer twice": (
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        "row_same_answers",
        "row_same_answers",
        {},
    ),
    "rejected answer that is none": (
        {"prompt": "a", "chosen": [_assistant("b")], "rejected": [_assistant("b"), _user("c")]},
        "row_open_turn",
        "row_open_turn",
        {"name": "rejected[3]"},
    ),
    "no role": (
        {"messages": [_user("a"), {"content": "b"}]},
        "row_role",
        "row_role",
        {"name": "messages[2]", "role": "None", "roles": "system, user, assistant, tool", "near": "none"},
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
        "row_system_late",
        {"name": "messages[3]", "role": "system", "expected": "user"},
    ),
    "only system": ({"messages": [_system("s")]}, "row_only_system", "row_open_turn", {"name": "messages"}),
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
    source = "".join(Path(str(module.__file__)).read_text() for module in (formats, turns))
    named = set(re.findall(r'\brefuse\(\s*[\w.]+,\s*"(\w+)"', source)) | {"row_order", "row_tool_without_result"}
    assert {key for _, key, _, _ in REFUSALS.values()} == named
    assert len(named) >= 21


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


TURNS = [_system("S"), _user("q"), _assistant("a")]
ANSWERS = {"chosen": "yes", "rejected": "no"}
SHARE = {"system": "system", "user": "human", "assistant": "gpt"}


def _sharegpt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"from": SHARE[turn["role"]], "value": turn["content"]} for turn in messages]


SHAPES: dict[str, list[dict[str, Any]]] = {
    "alpaca": [{"instruction": "q", "output": "a", "system": "S"}],
    "messages": [{"messages": TURNS}, {"messages": TURNS[1:], "system": "S"}],
    "sharegpt": [{"conversations": _sharegpt(TURNS)}, {"conversations": _sharegpt(TURNS[1:]), "system": "S"}],
    "prompt and completion": [
        {"prompt": "q", "completion": "a", "system": "S"},
        {"prompt": TURNS[:2], "completion": TURNS[2:]},
    ],
    "prompt and response": [{"prompt": "q", "response": "a", "system": "S"}],
    "query and response": [{"query": "q", "response": "a", "system": "S", "history": []}],
    "question and answer": [{"question": "q", "answer": "a", "system": "S"}],
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_says_the_same(name: str) -> None:
    for value in SHAPES[name]:
        assert recognise(RawRow(WHERE, value)) == name
        assert _convert(value) == Conversation(WHERE, tuple(TURNS))
        assert ignored_keys(RawRow(WHERE, value | {"id": 1})) == {"id"}


PREFERENCES: dict[str, list[dict[str, Any]]] = {
    "preference": [
        {"prompt": "q", "system": "S", **ANSWERS},
        {"prompt": TURNS[:2], "chosen": [_assistant("yes")], "rejected": [_assistant("no")]},
    ],
    "preference (instruction)": [{"instruction": "q", "system": "S", **ANSWERS}],
    "preference (conversations)": [
        {
            "conversations": _sharegpt(TURNS[:2]),
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        }
    ],
    "preference (two conversations)": [
        {"chosen": [*TURNS[:2], _assistant("yes")], "rejected": [*TURNS[:2], _assistant("no")]}
    ],
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_every_shape_of_preference(name: str) -> None:
    for value in PREFERENCES[name]:
        assert recognise(RawRow(WHERE, value)) == name
        found = _convert(value)
        assert found.messages == (*TURNS[:2], _assistant("yes"))
        assert found.rejected == (*TURNS[:2], _assistant("no"))


def test_text_is_learned_whole() -> None:
    assert _convert({"text": " some <s>text "}) == Conversation(WHERE, (), text=" some <s>text ")


def test_every_format_is_met_above() -> None:
    assert {*SHAPES, *PREFERENCES, "text"} == set(FORMATS)


def test_a_format_that_is_tried_first_needs_more() -> None:
    """A row that has the keys of two formats is read by the one that needs more of them, or neither holds the other."""
    needs = [known.needs for known in FORMATS.values()]
    assert all(not later > earlier for number, earlier in enumerate(needs) for later in needs[number + 1 :])


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x":  1}'])
def test_tools_and_their_calls(tools: Any, arguments: Any) -> None:
    """Of a row, arguments stay as they are written; ShareGPT's words for them say the same."""
    result = {"role": "tool", "content": "2"}
    messages = [_user("a"), _call("f", arguments), result, _assistant("b")]
    found = _convert({"messages": messages, "tools": tools})
    assert found.tools == tuple(TOOLS)
    assert found.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": arguments}
    assert found.messages[1]["content"] == ""
    assert [turn["role"] for turn in found.messages] == ["user", "assistant", "tool", "assistant"]
    call = json.dumps({"name": "f", "arguments": arguments})
    turns = [("human", "a"), ("function_call", call), ("observation", "2"), ("gpt", "b")]
    shared = _convert({"conversations": [{"from": role, "value": value} for role, value in turns], "tools": tools})
    assert [turn["role"] for turn in shared.messages] == [turn["role"] for turn in found.messages]
    assert shared.messages[1]["tool_calls"][0]["function"] == found.messages[1]["tool_calls"][0]["function"]
    assert _convert({"messages": messages[:2], "tools": tools}).messages == found.messages[:2]


def test_openai_s_weight_is_a_flag() -> None:
    messages = [_user("a"), _assistant("b", weight=0), _user("c"), _assistant("d", weight=1)]
    assert [is_target(turn) for turn in _convert({"messages": messages}).messages] == [False, False, False, True]


def test_system_and_tools_are_read_by_every_shape() -> None:
    """What a format says that it reads, it reads: nothing of it is left out without a note."""
    values = [value for some in (*SHAPES.values(), *PREFERENCES.values()) for value in some]
    compared = 0
    for value in values:
        row = RawRow(WHERE, {key: item for key, item in value.items() if key != "system"} | {"system": "Be brief."})
        if "system" in ignored_keys(row) or json.dumps(value).count('"system"') > ("system" in value):
            continue
        assert to_conversation(row).messages[0] == _system("Be brief."), value
        compared += 1
        with_tools = RawRow(WHERE, row.value | {"tools": TOOLS})
        if "tools" not in ignored_keys(with_tools):
            assert to_conversation(with_tools).tools == tuple(TOOLS)
    assert compared >= 8


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_preference_needs_both_answers(side: str) -> None:
    answers = {"chosen": _assistant("yes"), "rejected": _assistant("no")}
    answers[side] |= {"train": False}
    assert _refused({"prompt": "q", **answers}).key == "row_nothing_learned"


def test_null_is_no_key() -> None:
    """Parquet fills what a turn does not have."""
    turns = [_user("a", tool_calls=None, name=None), _assistant("b", reasoning_content=None, tool_calls=None)]
    assert _convert({"messages": turns, "tools": None}) == _convert({"messages": OPEN})


@pytest.mark.parametrize("tools", [[], "", "[]", None])
def test_no_tools_are_none(tools: Any) -> None:
    assert _convert({"messages": OPEN, "tools": tools}).tools is None


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"messages": OPEN, "tools": [{"type": "function", "function": "f"}]}, "row_tools"),
        ({"messages": OPEN, "tools": "[" * 100_000}, "row_tool_arguments"),
        ({"messages": OPEN, "tools": [{"function": {"name": "f", "description": "\ud83d"}}]}, "row_bad_character"),
        ({"messages": [_user("a"), _call("f", {"x": "\x00"})]}, "row_bad_character"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "row_role"),
        ({"conversations": [{"from": "human", "value": "x", "content": "y"}]}, "row_role"),
    ],
)
def test_odd_values_are_refused(value: dict[str, Any], key: str) -> None:
    assert _refused(value).key == key
