"""Raw row → Conversation. A format is one entry of FORMATS: how to recognise it by its keys, how to convert it."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import lru_cache, partial
from typing import NamedTuple, NoReturn

from truetune.data.turns import (
    check_calls,
    check_order,
    checked_text,
    is_target,
    read_tools,
    read_turn,
    read_turns,
    refuse,
)
from truetune.records import Conversation, Message, RawRow

Turns = list[Message]


class Format(NamedTuple):
    """`needs`: keys that tell the format; `may`: keys that it reads besides; `convert`: row → conversation."""

    needs: frozenset[str]
    may: frozenset[str]
    convert: Callable[[RawRow, str], Conversation]


def to_conversation(row: RawRow, *, input_join: str = "\n") -> Conversation:
    """Return the row as a conversation, checked turn by turn.

    Raises: RowError with the row's "file:line" if the shape is unknown or a turn cannot be trained.
    """
    conversation = FORMATS[recognise(row)].convert(row, input_join)
    if conversation.text is None:
        check_order(row.where, conversation.messages)
        if conversation.rejected:
            check_order(row.where, conversation.rejected, name="rejected")
            if not (is_target(conversation.messages[-1]) and is_target(conversation.rejected[-1])):
                refuse(row.where, "row_nothing_learned", fix="row_nothing_learned")
        check_calls(row.where, conversation.messages, tools=conversation.tools)
        if not any(map(is_target, conversation.messages)):
            refuse(row.where, "row_nothing_learned", fix="row_nothing_learned")
    return conversation


def recognise(row: RawRow) -> str:
    """Return the name of the row's format.

    Raises: RowError listing the keys found, and the nearest known key.
    """
    return format_of(row) or _refuse_shape(row)


def format_of(row: RawRow) -> str | None:
    """Return the name of the row's format, None if it has none."""
    return _format_of_keys(tuple(row.value))


@lru_cache(maxsize=256)
def _format_of_keys(keys: tuple[str, ...]) -> str | None:
    """The rows of a file have few different sets of keys."""
    return next((name for name, known in FORMATS.items() if known.needs <= set(keys)), None)


def _refuse_shape(row: RawRow) -> NoReturn:
    keys = set(row.value)
    needed = sorted({key for known in FORMATS.values() for key in known.needs})
    missing = _nearest_missing(keys)
    if missing:
        refuse(row.where, "row_missing_key", fix="row_missing_key", name=missing, found=_names(keys))
    near = [match for key in keys for match in get_close_matches(key, needed, n=1)]
    nested = [key for key, item in row.value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if nested and not get_close_matches(nested[0], needed, n=1):
        refuse(row.where, "row_nested", fix="row_nested", name=nested[0], count=len(row.value[nested[0]]))
    fix = "row_did_you_mean" if near else "row_unknown_keys"
    refuse(row.where, "row_unknown_keys", fix=fix, found=_names(keys), near=near[0] if near else "")


def ignored_keys(row: RawRow) -> set[str]:
    """Return the keys of a recognised row that its format does not read (ids, labels); they are counted and shown."""
    known = FORMATS[recognise(row)]
    return row.value.keys() - known.needs - known.may


def _nearest_missing(keys: set[str]) -> str | None:
    """A row that has all but one key of a format lacks that key."""
    for known in FORMATS.values():
        missing = known.needs - keys
        if len(missing) == 1 and keys & known.needs:
            return next(iter(missing))
    return None


def _names(keys: set[str]) -> str:
    return ", ".join(sorted(keys)) or "-"


def _text(row: RawRow, key: str, *, may_be_empty: bool = False) -> str:
    """Return a text field; anything else is refused with what it is."""
    value = row.value.get(key)
    if value is None and may_be_empty:
        return ""
    return checked_text(row.where, value, name=key, may_be_empty=may_be_empty)


def _before(row: RawRow) -> Turns:
    """Return the turns that `system` and `history` give."""
    system = _text(row, "system", may_be_empty=True)
    messages: Turns = [{"role": "system", "content": system}] if system else []
    history = row.value.get("history") or []
    if not isinstance(history, list):
        refuse(row.where, "row_history", fix="row_history", number=1)
    for number, turn in enumerate(history, start=1):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
            refuse(row.where, "row_history", fix="row_history", number=number)
        question, answer = (checked_text(row.where, part, name=f"history[{number}]") for part in turn)
        messages += [_user(question), _assistant(answer)]
    return messages


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _instruction(row: RawRow, input_join: str) -> Message:
    extra = _text(row, "input", may_be_empty=True)
    instruction = _text(row, "instruction", may_be_empty=bool(extra))
    return _user(input_join.join(part for part in (instruction, extra) if part))


def _from_alpaca(row: RawRow, input_join: str) -> Conversation:
    turns = [*_before(row), _instruction(row, input_join), _assistant(_text(row, "output"))]
    return Conversation(row.where, tuple(turns))


def _from_texts(row: RawRow, _input_join: str, *, question: str, answer: str) -> Conversation:
    """A question and its answer, each a text or a list of turns (TRL's conversational prompt and completion)."""
    values = row.value[question], row.value[answer]
    if all(isinstance(value, list) for value in values):
        turns = [turn for name in (question, answer) for turn in read_turns(row.where, row.value[name], name=name)]
        return _with_tools(row, turns)
    return _with_tools(row, [_user(_text(row, question)), _assistant(_text(row, answer))])


def _from_turns(row: RawRow, _input_join: str, *, name: str) -> Conversation:
    return _with_tools(row, read_turns(row.where, row.value[name], name=name))


def _with_tools(row: RawRow, turns: Turns) -> Conversation:
    return Conversation(row.where, (*_before(row), *turns), tools=read_tools(row.where, row.value.get("tools")))


def _from_preference(row: RawRow, input_join: str) -> Conversation:
    """A prompt (a text, turns, an instruction, or the turns that both answers begin with) and two answers."""
    chosen, rejected = (_answer(row, name) for name in ("chosen", "rejected"))
    if "conversations" in row.value:
        prompt = read_turns(row.where, row.value["conversations"], name="conversations")
    elif "instruction" in row.value:
        prompt = [_instruction(row, input_join)]
    elif "prompt" not in row.value:
        prompt = []
    elif isinstance(row.value["prompt"], list):
        prompt = read_turns(row.where, row.value["prompt"], name="prompt")
    else:
        prompt = [_user(_text(row, "prompt"))]
    if chosen == rejected:
        refuse(row.where, "row_same_answers", fix="row_same_answers")
    tools = read_tools(row.where, row.value.get("tools"))
    before = (*_before(row), *prompt)
    return Conversation(row.where, (*before, *chosen), tools=tools, rejected=(*before, *rejected))


def _answer(row: RawRow, name: str) -> Turns:
    value = row.value[name]
    if isinstance(value, list):
        return read_turns(row.where, value, name=name)
    return [read_turn(row.where, value, name=name) if isinstance(value, dict) else _assistant(_text(row, name))]


def _from_text(row: RawRow, _input_join: str) -> Conversation:
    return Conversation(row.where, (), text=_text(row, "text"))


_BEFORE = frozenset({"system", "history"})
_TURNS = _BEFORE | {"tools"}


def _texts(question: str, answer: str) -> Format:
    convert = partial(_from_texts, question=question, answer=answer)
    return Format(frozenset({question, answer}), _TURNS, convert)


def _preference(*prompt: str, may: frozenset[str] = _TURNS) -> Format:
    return Format(frozenset({*prompt, "chosen", "rejected"}), may, _from_preference)


FORMATS: dict[str, Format] = {
    "preference (conversations)": _preference("conversations"),
    "preference (instruction)": _preference("instruction", may=_TURNS | {"input"}),
    "preference": _preference("prompt"),
    "preference (two conversations)": _preference(),
    "alpaca": Format(frozenset({"instruction", "output"}), _BEFORE | {"input"}, _from_alpaca),
    "messages": Format(frozenset({"messages"}), _TURNS, partial(_from_turns, name="messages")),
    "sharegpt": Format(frozenset({"conversations"}), _TURNS, partial(_from_turns, name="conversations")),
    "prompt and completion": _texts("prompt", "completion"),
    "prompt and response": _texts("prompt", "response"),
    "query and response": _texts("query", "response"),
    "question and answer": _texts("question", "answer"),
    "text": Format(frozenset({"text"}), frozenset(), _from_text),
}
"""Tried in this order: the first whose keys are all there."""
