"""Paths → raw rows with their origin "file:line", strictly: what is not JSON is refused where it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from truetune.errors import RowError, UserError
from truetune.records import RawRow

SUFFIXES = (".json", ".jsonl")
BEHIND_ARRAY = "text behind the closing ]"
_WHITESPACE = " \t\n\r"
_CONSTANT = re.compile(r"[:\[,]\s*(NaN|-?Infinity)")


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
            found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
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
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        where = f"{path}:{line}"
        if error.reason == "unexpected end of data":
            raise UserError("data_cut_in_character", where=where, fix="data_cut") from None
        raise UserError("data_not_utf8", where=where, fix="data_not_utf8", byte=error.start, path=str(path)) from None


def _skip(source: str, position: int) -> int:
    while position < len(source) and source[position] in _WHITESPACE:
        position += 1
    return position


def _read_array(path: Path, source: str, position: int) -> Iterator[RawRow | RowError]:
    """Walk the elements of a top-level array, counting lines on the way."""
    line, counted, number, where = 1, 0, 0, ""
    position = _skip(source, position)
    if source[position : position + 1] == "]":
        raise UserError("data_empty", where=str(path), fix="data_empty")
    while True:
        line += source.count("\n", counted, position)
        counted = position
        number += 1
        # Several rows on one line (json.dump writes all on the first): the number tells them apart.
        is_same_line = where.partition("#")[0] == f"{path}:{line}"
        where = f"{path}:{line}#{number}" if is_same_line else f"{path}:{line}"
        try:
            value, end = _DECODER.raw_decode(source, position)
            yield _as_row(where, value)
        except _Duplicate as error:
            yield RowError("row_key_twice", where=where, fix="row_key_twice", name=str(error))
            end = _end_of(path, source, position, number)
        except (ValueError, RecursionError) as error:
            raise _not_json(path, source, error, position, number) from None
        position = _skip(source, end)
        if source[position : position + 1] == "]":
            break
        if source[position : position + 1] != ",":
            raise _not_json(path, source, json.JSONDecodeError("expected , or ]", source, position), position, number)
        position = _skip(source, position + 1)
    rest = _skip(source, position + 1)
    if rest < len(source):
        raise _not_json(path, source, json.JSONDecodeError(BEHIND_ARRAY, source, rest), rest, number)


def _end_of(path: Path, source: str, position: int, number: int) -> int:
    """Return where the value at `position` ends, whatever keys it gives twice."""
    try:
        return json.JSONDecoder().raw_decode(source, position)[1]
    except (ValueError, RecursionError) as error:
        raise _not_json(path, source, error, position, number) from None


def _read_lines(path: Path, source: str) -> Iterator[RawRow | RowError]:
    """Read JSON lines; a single object over several lines is one row."""
    offset = 0
    for number, line in enumerate(source.split("\n"), start=1):
        stripped = line.strip(_WHITESPACE)
        if stripped:
            is_whole = stripped in "{[" or not stripped.endswith("}")
            start = offset + line.index(stripped)
            if is_whole and source[:start].strip(_WHITESPACE) == "":
                yield _decode_row(path, source, start, len(source), number)
                return
            yield _decode_row(path, source, start, start + len(stripped), number)
        offset += len(line) + 1


def _decode_row(path: Path, source: str, start: int, end: int, number: int) -> RawRow | RowError:
    """Decode source[start:end], which stands in line `number`."""
    where = f"{path}:{number}"
    try:
        return _as_row(where, _DECODER.decode(source[start:end]))
    except _Duplicate as error:
        _end_of(path, source, start, number)
        return RowError("row_key_twice", where=where, fix="row_key_twice", name=str(error))
    except (ValueError, RecursionError) as error:
        raise _not_json(path, source, error, start, number, base=start) from None


def _as_row(where: str, value: Any) -> RawRow | RowError:
    if not isinstance(value, dict):
        return RowError("row_not_object", where=where, fix="row_not_object", kind=kind_of(value))
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if len(value) <= 2 and lists and not {"messages", "conversations"} & set(value):
        return RowError("row_nested", where=where, fix="row_nested", name=lists[0], count=len(value[lists[0]]))
    return RawRow(where, value)


def _not_json(
    path: Path, source: str, error: ValueError | RecursionError, position: int, record: int, *, base: int = 0
) -> UserError:
    """Return the error with line, column and the text there; `position`: where the record starts."""
    at, problem = position, "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        at, problem = base + error.pos, error.msg
    elif isinstance(error, ValueError):
        constant = _CONSTANT.search(source, position)
        at, problem = constant.start(1) if constant else position, str(error)
    start = source.rfind("\n", 0, at) + 1
    where = f"{path}:{source.count(chr(10), 0, at) + 1}:{at - start + 1}"
    # The fault is at the end, or in a last line that nothing closes: the file was cut.
    rest = source[at:].rstrip()
    is_behind = isinstance(error, json.JSONDecodeError) and error.msg in ("Extra data", BEHIND_ARRAY)
    if not is_behind and (not rest or ("\n" not in rest and not rest.endswith(("]", "}")))):
        return UserError("data_cut", where=where, fix="data_cut", record=record)
    context = (source[max(start, at - 30) : at + 30].splitlines() or [""])[0]
    return UserError("data_not_json", where=where, fix="data_not_json", problem=problem, context=context)


def kind_of(value: Any) -> str:
    """Return the JSON name of a value's type.

    >>> kind_of(3), kind_of(None), kind_of([])
    ('number', 'null', 'list')
    """
    names = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
