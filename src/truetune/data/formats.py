"""Raw row → Conversation. A format is one entry of FORMATS: how to recognise it by its keys, how to convert it."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NamedTuple, NoReturn

from truetune.data.sources import kind_of
from truetune.errors import RowError
from truetune.records import Conversation, Message, RawRow

ROLES = ("system", "user", "assistant")
_MESSAGE_KEYS = {"role", "content", "reasoning_content", "train", "loss"}


class Format(NamedTuple):
    """`needs`: keys that tell the format; `may`: keys that it reads besides; `convert`: row → messages."""

    needs: frozenset[str]
    may: frozenset[str]
    convert: Callable[[RawRow, str], list[Message]]


def to_conversation(row: RawRow, *, input_join: str = "\n") -> Conversation:
    """Return the row as a conversation, checked turn by turn.

    Raises: RowError with the row's "file:line" if the shape is unknown or a turn cannot be trained.
    """
    name = recognise(row)
    messages = FORMATS[name].convert(row, input_join)
    _check_order(row.where, messages)
    return Conversation(row.where, tuple(messages))


def recognise(row: RawRow) -> str:
    """Return the name of the row's format.

    Raises: RowError listing the keys found, and the nearest known key.
    """
    keys = set(row.value)
    found = next((name for name, known in FORMATS.items() if known.needs <= keys), None)
    return found or _refuse_shape(row)


def _refuse_shape(row: RawRow) -> NoReturn:
    keys = set(row.value)
    needed = sorted({key for known in FORMATS.values() for key in known.needs})
    missing = _nearest_missing(keys)
    if missing:
        _refuse(row.where, "row_missing_key", "row_missing_key", name=missing, found=_names(keys))
    near = [match for key in keys for match in get_close_matches(key, needed, n=1)]
    fix = "row_did_you_mean" if near else "row_unknown_keys"
    _refuse(row.where, "row_unknown_keys", fix, found=_names(keys), near=near[0] if near else "")


def ignored_keys(row: RawRow) -> set[str]:
    """Return the keys of a recognised row that its format does not read (ids, labels); they are counted and shown."""
    known = FORMATS[recognise(row)]
    return set(row.value) - known.needs - known.may


def _nearest_missing(keys: set[str]) -> str | None:
    """A row that has all but one key of a format lacks that key."""
    for known in FORMATS.values():
        missing = known.needs - keys
        if len(missing) == 1 and keys & known.needs:
            return next(iter(missing))
    return None


def _names(keys: set[str]) -> str:
    return ", ".join(sorted(keys)) or "-"


def _refuse(where: str, key: str, fix: str, **values: Any) -> NoReturn:
    raise RowError(key, where=where, fix=fix, **values)


def _text(row: RawRow, key: str, *, may_be_empty: bool = False) -> str:
    """Return a text field; anything else is refused with what it is."""
    value = row.value.get(key)
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        _refuse(row.where, "row_not_text", "row_not_text", name=key, kind=kind_of(value))
    return _checked(row.where, key, value, may_be_empty=may_be_empty)


def _checked(where: str, key: str, value: str, *, may_be_empty: bool = False) -> str:
    if not may_be_empty and not value.strip():
        _refuse(where, "row_empty_text", "row_empty_text", name=key)
    if "\x00" in value or any("\ud800" <= char <= "\udfff" for char in value):
        _refuse(where, "row_bad_character", "row_bad_character", name=key)
    return value


def _from_alpaca(row: RawRow, input_join: str) -> list[Message]:
    messages: list[Message] = []
    system = _text(row, "system", may_be_empty=True)
    if system:
        messages.append({"role": "system", "content": system})
    history = row.value.get("history") or []
    if not isinstance(history, list):
        _refuse(row.where, "row_history", "row_history", number=1)
    for number, turn in enumerate(history, start=1):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
            _refuse(row.where, "row_history", "row_history", number=number)
        question, answer = (_checked(row.where, f"history[{number}]", part) for part in turn)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    extra = _text(row, "input", may_be_empty=True)
    instruction = _text(row, "instruction", may_be_empty=bool(extra))
    prompt = input_join.join(part for part in (instruction, extra) if part)
    return [*messages, {"role": "user", "content": prompt}, {"role": "assistant", "content": _text(row, "output")}]


def _from_messages(row: RawRow, _input_join: str) -> list[Message]:
    turns = row.value["messages"]
    if not isinstance(turns, list) or not turns:
        _refuse(row.where, "row_messages", "row_messages", kind=kind_of(turns))
    return [_message(row.where, number, turn) for number, turn in enumerate(turns, start=1)]


def _message(where: str, number: int, turn: Any) -> Message:
    """Return one checked turn; `train` and `loss` flags become `is_target`."""
    name = f"messages[{number}]"
    if not isinstance(turn, dict):
        _refuse(where, "row_turn_not_object", "row_messages", name=name, kind=kind_of(turn))
    unknown = set(turn) - (_MESSAGE_KEYS if turn.get("role") == "assistant" else _MESSAGE_KEYS - {"reasoning_content"})
    if unknown:
        _refuse(where, "row_turn_keys", "row_turn_keys", name=name, found=_names(unknown))
    role = turn.get("role")
    if role not in ROLES:
        _refuse(where, "row_role", "row_role", name=name, role=repr(role), roles=", ".join(ROLES))
    message: Message = {"role": role}
    for key in ("content", "reasoning_content"):
        value = turn.get(key)
        if key == "reasoning_content" and value in (None, ""):
            continue
        if not isinstance(value, str):
            _refuse(where, "row_not_text", "row_not_text", name=f"{name}.{key}", kind=kind_of(value))
        message[key] = _checked(where, f"{name}.{key}", value, may_be_empty=role == "system")
    flags = [turn[key] for key in ("train", "loss") if turn.get(key) is not None]
    if any(not isinstance(flag, bool) and flag not in (0, 1) for flag in flags):
        _refuse(where, "row_flag", "row_flag", name=name)
    if flags:
        message["is_target"] = all(map(bool, flags))
    return message


def _check_order(where: str, messages: list[Message]) -> None:
    """A system message may come first; then user and assistant take turns; an assistant turn ends the row."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    offset = len(messages) - len(turns)
    for number, message in enumerate(turns):
        expected = "user" if number % 2 == 0 else "assistant"
        if message["role"] != expected:
            name = f"messages[{number + offset + 1}]"
            _refuse(where, "row_order", "row_order", name=name, role=message["role"], expected=expected)
    if not turns:
        _refuse(where, "row_only_system", "row_open_turn")
    if turns[-1]["role"] != "assistant":
        _refuse(where, "row_open_turn", "row_open_turn", name=f"messages[{len(messages)}]")
    if not any(is_target(message) for message in messages):
        _refuse(where, "row_nothing_learned", "row_nothing_learned")


def is_target(message: Message) -> bool:
    """True if the turn is learned: an assistant's, unless its flag says otherwise."""
    return bool(message["role"] == "assistant" and message.get("is_target", True))


FORMATS: dict[str, Format] = {
    "alpaca": Format(frozenset({"instruction", "output"}), frozenset({"input", "system", "history"}), _from_alpaca),
    "messages": Format(frozenset({"messages"}), frozenset(), _from_messages),
}
