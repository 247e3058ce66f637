"""Paths → raw rows with their origin "file:line", strictly: what is not JSON is refused where it stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from truetune.errors import RowError, UserError
from truetune.records import RawRow

SUFFIXES = (".json", ".jsonl")
_WHITESPACE = " \t\n\r"


class _Duplicate(ValueError):
    """A key stands twice in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        raise _Duplicate(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def find_files(names: list[str]) -> list[Path]:
    """Return the data files that `names` mean; a folder means the .json and .jsonl files in it, sorted.

    Raises: UserError if a name does not exist, is no regular file, or a folder holds no data file.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
            if not found:
                raise UserError("data_folder_empty", where=name, fix="data_folder_empty")
            files += found
        elif not path.exists():
            raise _missing(path)
        elif not path.is_file():
            raise UserError("data_not_file", where=name, fix="data_not_file")
        else:
            files.append(path)
    return files


def _missing(path: Path) -> UserError:
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, names, n=1)
    if near:
        return UserError("data_missing", where=str(path), fix="data_did_you_mean", near=str(path.parent / near[0]))
    return UserError("data_missing", where=str(path), fix="data_missing", folder=str(path.parent.resolve()))


def read_rows(path: Path) -> Iterator[RawRow | RowError]:
    """Yield each row of a JSON array or of JSON lines (which of them is seen from the content), or why it is refused.

    Raises: UserError if the file as a whole cannot be read: empty, not UTF-8, not JSON.
    """
    source = _decode(path)
    start = _skip(source, 0)
    if start == len(source):
        raise UserError("data_empty", where=str(path), fix="data_empty")
    if source[start] == "[":
        yield from _read_array(path, source, start + 1)
    else:
        yield from _read_lines(path, source)


def _decode(path: Path) -> str:
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError("data_utf16", where=str(path), fix="data_utf16", path=str(path))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        where = f"{path}:{line}"
        raise UserError("data_not_utf8", where=where, fix="data_not_utf8", byte=error.start, path=str(path)) from None


def _skip(source: str, position: int) -> int:
    while position < len(source) and source[position] in _WHITESPACE:
        position += 1
    return position


def _read_array(path: Path, source: str, position: int) -> Iterator[RawRow | RowError]:
    """Walk the elements of a top-level array, counting lines on the way."""
    line, counted, number = 1, 0, 0
    position = _skip(source, position)
    if source[position : position + 1] == "]":
        raise UserError("data_empty", where=str(path), fix="data_empty")
    while True:
        line += source.count("\n", counted, position)
        counted = position
        number += 1
        try:
            value, end = _DECODER.raw_decode(source, position)
            yield _as_row(f"{path}:{line}", value)
        except _Duplicate as error:
            yield RowError("row_key_twice", where=f"{path}:{line}", fix="row_key_twice", name=str(error))
            _, end = json.JSONDecoder().raw_decode(source, position)
        except ValueError as error:
            raise _not_json(path, source, error, position, number) from None
        position = _skip(source, end)
        if source[position : position + 1] == "]":
            break
        if source[position : position + 1] != ",":
            raise _not_json(path, source, json.JSONDecodeError("expected , or ]", source, position), position, number)
        position = _skip(source, position + 1)
    rest = _skip(source, position + 1)
    if rest < len(source):
        raise _not_json(path, source, json.JSONDecodeError("text behind the closing ]", source, rest), rest, number)


def _read_lines(path: Path, source: str) -> Iterator[RawRow | RowError]:
    """Read JSON lines; a single object over several lines is one row."""
    lines = source.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip(_WHITESPACE):
            continue
        where = f"{path}:{number}"
        try:
            yield _as_row(where, _DECODER.decode(line))
        except _Duplicate as error:
            yield RowError("row_key_twice", where=where, fix="row_key_twice", name=str(error))
        except ValueError as error:
            whole = _single_object(source)
            if whole is not None:
                yield _as_row(where, whole)
                return
            offset = sum(len(earlier) + 1 for earlier in lines[: number - 1])
            raise _not_json(path, source, error, offset, number, base=offset) from None


def _single_object(source: str) -> Any:
    try:
        return _DECODER.decode(source)
    except ValueError:
        return None


def _as_row(where: str, value: Any) -> RawRow | RowError:
    if not isinstance(value, dict):
        return RowError("row_not_object", where=where, fix="row_not_object", kind=kind_of(value))
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if len(value) <= 2 and lists and lists[0] not in ("messages", "conversations"):
        return RowError("row_nested", where=where, fix="row_nested", name=lists[0], count=len(value[lists[0]]))
    return RawRow(where, value)


def _not_json(path: Path, source: str, error: ValueError, position: int, record: int, *, base: int = 0) -> UserError:
    """Return the error with line, column and the text there."""
    at = base + error.pos if isinstance(error, json.JSONDecodeError) else position
    line = source.count("\n", 0, at) + 1
    column = at - (source.rfind("\n", 0, at) + 1) + 1
    problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    if at >= len(source.rstrip()):
        return UserError("data_cut", where=f"{path}:{line}:{column}", fix="data_cut", record=record)
    start = source.rfind("\n", 0, at) + 1
    context = source[max(start, at - 30) : at + 30].split("\n")[0]
    where = f"{path}:{line}:{column}"
    return UserError("data_not_json", where=where, fix="data_not_json", problem=problem, context=context)


def kind_of(value: Any) -> str:
    """Return the JSON name of a value's type.

    >>> kind_of(3), kind_of(None), kind_of([])
    ('number', 'null', 'list')
    """
    names = {dict: "object", list: "list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "number")
