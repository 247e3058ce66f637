"""Turns of a conversation, checked one by one and in their order; tools and their calls."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from truetune.data.json_rows import kind_of
from truetune.errors import RowError
from truetune.records import Message

ROLES = ("system", "user", "assistant", "tool")
FLAGS = ("train", "loss", "weight")
"""Of a turn: false or 0 where it is only read. `weight` is OpenAI's name."""

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")  # NUL, and halves of surrogate pairs
_KEYS = {
    "system": {"role", "content"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "reasoning_content", "tool_calls"},
    "tool": {"role", "content", "name", "tool_call_id"},
}


def refuse(where: str, key: str, *, fix: str, **values: Any) -> NoReturn:
    """Raise the RowError of a row."""
    raise RowError(key, where=where, fix=fix, **values)


def is_target(message: Message) -> bool:
    """True if the turn is learned: an assistant's, unless its flag says otherwise."""
    return bool(message["role"] == "assistant" and message.get("is_target", True))


def checked_text(where: str, value: Any, *, name: str, may_be_empty: bool = False) -> str:
    """Return a text; anything else, an empty one, or characters that are no text are refused."""
    if not isinstance(value, str):
        refuse(where, "row_not_text", fix="row_not_text", name=name, kind=kind_of(value))
    if not may_be_empty and not value.strip():
        refuse(where, "row_empty_text", fix="row_empty_text", name=name)
    if _NO_TEXT.search(value):
        refuse(where, "row_bad_character", fix="row_bad_character", name=name)
    return value


def read_turns(where: str, turns: Any, *, name: str) -> list[Message]:
    """Return a checked list of turns, in OpenAI's or ShareGPT's words. `name`: of the list, for messages.

    Raises: RowError naming the first turn that is none.
    """
    if not isinstance(turns, list) or not turns:
        refuse(where, "row_messages", fix="row_messages", name=name, kind=kind_of(turns))
    return [read_turn(where, turn, name=f"{name}[{number}]") for number, turn in enumerate(turns, start=1)]


def read_turn(where: str, turn: Any, *, name: str) -> Message:
    """Return one checked turn; `train`, `loss` and `weight` flags become `is_target`."""
    if not isinstance(turn, dict):
        refuse(where, "row_turn_not_object", fix="row_messages", name=name, kind=kind_of(turn))
    if "from" in turn and "role" not in turn and "content" not in turn:
        turn = _from_sharegpt(where, name, turn)
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        near = str(role).strip().lower()
        fix = "row_role_case" if near in ROLES else "row_role"
        refuse(where, "row_role", fix=fix, name=name, role=repr(role), roles=", ".join(ROLES), near=near)
    # Parquet fills what a turn does not have with null.
    unknown = {key for key, value in turn.items() if value is not None} - _KEYS[role] - set(FLAGS)
    if unknown:
        refuse(where, "row_turn_keys", fix="row_turn_keys", name=name, found=", ".join(sorted(unknown)))
    message: Message = {"role": role}
    calls = _tool_calls(where, f"{name}.tool_calls", turn.get("tool_calls"))
    content = turn.get("content")
    if content is None and calls:
        content = ""
    may_be_empty = role in ("system", "tool") or bool(calls)
    message["content"] = checked_text(where, content, name=f"{name}.content", may_be_empty=may_be_empty)
    for key in ("reasoning_content", "name", "tool_call_id"):
        if turn.get(key) not in (None, ""):
            message[key] = checked_text(where, turn[key], name=f"{name}.{key}")
    if calls:
        message["tool_calls"] = calls
    flags = [turn[key] for key in FLAGS if turn.get(key) is not None]
    if any(not isinstance(flag, bool) and flag not in (0, 1) for flag in flags):
        refuse(where, "row_flag", fix="row_flag", name=name)
    if flags:
        message["is_target"] = all(map(bool, flags))
    return message


def _from_sharegpt(where: str, name: str, turn: dict[str, Any]) -> dict[str, Any]:
    """Return a ShareGPT turn in OpenAI's words."""
    kind = turn["from"]
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if not isinstance(kind, str) or kind not in SHAREGPT_ROLES:
        roles = ", ".join(SHAREGPT_ROLES)
        refuse(where, "row_role", fix="row_role", name=name, role=repr(kind), roles=roles, near="")
    message = {"role": SHAREGPT_ROLES[kind], "content": turn.get("value"), **rest}
    if kind == "function_call":
        calls = _parsed(where, f"{name}.value", turn.get("value"))
        message |= {"content": None, "tool_calls": calls if isinstance(calls, list) else [calls]}
    return message


def read_tools(where: str, tools: Any) -> tuple[dict[str, Any], ...] | None:
    """Return a row's tools (a list, or its JSON text), None if there are none.

    Raises: RowError if they are no list of objects with names.
    """
    if tools in (None, "", []):
        return None
    found = _parsed(where, "tools", tools) if isinstance(tools, str) else tools
    if not isinstance(found, list):
        refuse(where, "row_tools", fix="row_tools", name="tools", kind=kind_of(found))
    for number, tool in enumerate(found, start=1):
        function = _function(tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            refuse(where, "row_tools", fix="row_tools", name=f"tools[{number}]", kind=kind_of(tool))
    _check_characters(where, "tools", found)
    return tuple(found) or None


def _tool_calls(where: str, name: str, calls: Any) -> list[dict[str, Any]]:
    """Return checked calls; arguments stay as they are written: an object, or the JSON text of one."""
    if calls in (None, []):
        return []
    if not isinstance(calls, list):
        refuse(where, "row_tool_call", fix="row_tool_call", name=name, kind=kind_of(calls))
    for number, call in enumerate(calls, start=1):
        function = _function(call) if isinstance(call, dict) else {}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            refuse(where, "row_tool_call", fix="row_tool_call", name=f"{name}[{number}]", kind=kind_of(call))
        path = f"{name}[{number}].arguments"
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(where, path, arguments)
        if not isinstance(arguments, dict):
            refuse(where, "row_tool_arguments", fix="row_tool_arguments", name=path, problem=kind_of(arguments))
    _check_characters(where, name, calls)
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]


def _check_characters(where: str, name: str, value: Any) -> None:
    """Check every text inside a value."""
    if isinstance(value, str):
        checked_text(where, value, name=name, may_be_empty=True)
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            _check_characters(where, name, part)


def _function(call: dict[str, Any]) -> Any:
    return call.get("function", call)


def _parsed(where: str, name: str, source: Any) -> Any:
    """Parse JSON text inside a row."""
    try:
        return json.loads(source)
    except (TypeError, ValueError, RecursionError) as error:
        refuse(where, "row_tool_arguments", fix="row_tool_arguments", name=name, problem=str(error))


def check_order(where: str, messages: Sequence[Message], *, name: str = "messages") -> None:
    """A system message may come first; then user and assistant take turns; an assistant turn ends the row.

    user → assistant → user → assistant                       assistant with tool calls → tool, tool → assistant
    """
    start = int(messages[0]["role"] == "system")
    if len(messages) == start:
        refuse(where, "row_only_system", fix="row_open_turn", name=name)
    expected: tuple[str, ...] = ("user",)
    for number, message in enumerate(messages[start:], start=start + 1):
        role = message["role"]
        if role not in expected:
            values = {"name": f"{name}[{number}]", "role": role, "expected": expected[-1]}
            if expected == ("tool",):
                refuse(where, "row_tool_without_result", fix="row_tool_without_result", **values)
            refuse(where, "row_order", fix="row_system_late" if role == "system" else "row_order", **values)
        expected = _after(message)
    if messages[-1]["role"] != "assistant":
        refuse(where, "row_open_turn", fix="row_open_turn", name=f"{name}[{len(messages)}]")


def _after(message: Message) -> tuple[str, ...]:
    """Return the roles that may come after a turn."""
    if message["role"] == "assistant":
        return ("tool",) if message.get("tool_calls") else ("user",)
    return ("tool", "assistant") if message["role"] == "tool" else ("assistant",)


def check_calls(where: str, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] | None) -> None:
    """Refuse a call of a tool that the row does not declare, where it declares any."""
    if tools is None:
        return
    known = {_function(tool)["name"] for tool in tools}
    for number, message in enumerate(messages, start=1):
        for call in message.get("tool_calls", ()):
            name = call["function"]["name"]
            if name not in known:
                place = f"messages[{number}]"
                refuse(where, "row_tool_unknown", fix="row_tool_unknown", name=place, tool=name, known=", ".join(known))
