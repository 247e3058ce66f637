"""JSON arrays and JSON lines → raw rows, as a stream: a chunk of the file is in memory, and each row knows its line.

text of the file    [ {...}, {...}, {...   ...}, {...} ]
window                       ^^^^^^^^^^^              read so far and not yet given out
position                            ^                 of the record that comes next
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any, NoReturn

from truetune.data.mark import Cursor, Mark
from truetune.errors import RowError, UserError
from truetune.records import RawRow

CHUNK_BYTES = 1 << 20
MAX_RECORD_CHARS = 100_000_000
"""A record longer than this is taken for a file that is not what it seems."""

KEPT_CHARS = 64
"""What is kept of what was given out, for messages to show."""

_WHITESPACE = " \t\n\r"
_BLANK = re.compile(r"[ \t\n\r]*")
_CONSTANT = re.compile(r"[:\[,]\s*(NaN|-?Infinity)")
# Where a chunk ends inside a literal or an escape, the decoder faults this close before its end.
_NEAR_END = 16


class _Duplicate(ValueError):
    """A key stands twice in one object."""


class _Constant(ValueError):
    """NaN or Infinity."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        raise _Duplicate(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return value


def _no_constant(name: str) -> NoReturn:
    raise _Constant(f"{name} is not JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_LENIENT = json.JSONDecoder(parse_int=str)


def read_json(
    name: str, stream: IO[bytes], *, encoding: str = "utf-8", cursor: Cursor | None = None
) -> Iterator[RawRow | RowError]:
    """Yield each row of a JSON array or of JSON lines (seen from the content), or why it is refused.

    `name`: the file's, for `where`. A fault inside one line of JSON lines refuses that line; a fault of an array ends
    the reading. `cursor`: where to go on, if not at the beginning; it moves along.

    Raises: UserError if the file as a whole cannot be read: empty, another encoding, no JSON.
    """
    cursor = cursor or Cursor()
    window = cursor.window = _Window(name, stream, encoding, start=cursor.start)
    window.skip_blank()
    if not cursor.start.byte:
        if not window.rest():
            raise UserError("data_empty", where=name, fix="data_empty")
        cursor.is_array = window.rest() == "["
    yield from (_read_array if cursor.is_array else _read_lines)(window, cursor)


class _Window:
    """The text between what was read and what was given out. `text[position:]` comes next."""

    def __init__(self, name: str, stream: IO[bytes], encoding: str, *, start: Mark) -> None:
        self.name, self.encoding = name, encoding
        self.text, self.position, self.is_end = "", 0, False
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)("strict")
        self._num_bytes = start.byte
        # Where `text` starts in the file, and up to where lines were counted.
        self._column, self._line, self._counted = start.column, start.line, 0
        if start.byte:
            stream.seek(start.byte)
            self._take(stream.read(CHUNK_BYTES))
            return
        first = stream.read(max(CHUNK_BYTES, len(codecs.BOM_UTF8)))
        if first[:2] in (b"\xff\xfe", b"\xfe\xff") and encoding == "utf-8":
            raise UserError("data_utf16", where=name, fix="data_utf16", path=name)
        self._take(first)
        self.position = int(self.text.startswith("\ufeff"))
        self._column = -self.position

    def rest(self) -> str:
        """Return the next character, "" at the end."""
        return self.text[self.position : self.position + 1]

    def skip_blank(self) -> None:
        """Go to the next character that is no white space."""
        while True:
            match = _BLANK.match(self.text, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self.text) or not self.more():
                return

    def more(self) -> bool:
        """Read on and forget what was given out; False at the end of the file."""
        if self.is_end:
            return False
        if len(self.text) - self.position > MAX_RECORD_CHARS:
            raise UserError("data_record_large", where=self.where(), fix="data_record_large", most=MAX_RECORD_CHARS)
        self._forget()
        # Twice as much each time, so that a long record is not decoded again for every chunk.
        self._take(self._stream.read(max(CHUNK_BYTES, len(self.text))))
        return True

    def record(self) -> Any:
        """Decode the value at `position` and go behind it.

        Raises: JSONDecodeError or RecursionError with a position in `text`; another ValueError, behind the value.
        """
        fault: ValueError | None = None
        decoder = _STRICT
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _NEAR_END
                if not is_cut or not self.more():
                    raise
            except ValueError as error:  # a key twice, NaN, a number too long for Python
                fault, decoder = error, _LENIENT
            else:
                # A number at the end of a chunk may go on in the next.
                if end < len(self.text) or not self.more():
                    self.position = end
                    if fault is not None:
                        raise fault
                    return value

    def line(self) -> str:
        """Return the text from `position` to the end of its line; the position stays."""
        num_seen = 0
        while True:
            end = self.text.find("\n", self.position + num_seen)
            if end >= 0:
                return self.text[self.position : end]
            num_seen = len(self.text) - self.position
            if not self.more():
                return self.text[self.position :]

    def is_last(self, line: str) -> bool:
        """Return whether nothing but white space follows a line at `position`."""
        while True:
            match = _BLANK.match(self.text, self.position + len(line))
            if match is None or match.end() < len(self.text):
                return False
            if not self.more():
                return True

    def line_number(self) -> int:
        """Return the line of the file at `position`, counted from 1."""
        self._line += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def place(self) -> tuple[int, int, int]:
        """Return the bytes of the file, the line and the characters of it before `position`."""
        num_unused = len(self._decoder.getstate()[0]) + len(self.text[self.position :].encode(self.encoding))
        start = self.text.rfind("\n", 0, self.position)
        column = self.position - start - 1 if start >= 0 else self._column + self.position
        return self._num_bytes - num_unused, self.line_number(), column

    def where(self, at: int | None = None) -> str:
        """Return "file:line" of `position`, or "file:line:column" of a place `at` behind it in `text`."""
        if at is None:
            return f"{self.name}:{self.line_number()}"
        line = self.line_number() + self.text.count("\n", self.position, at)
        start = self.text.rfind("\n", 0, at)
        return f"{self.name}:{line}:{at - start if start >= 0 else self._column + at + 1}"

    def _forget(self) -> None:
        self.line_number()
        gone = max(self.position - KEPT_CHARS, 0)
        start = self.text.rfind("\n", 0, gone)
        self._column = gone - start - 1 if start >= 0 else self._column + gone
        self.text = self.text[gone:]
        self.position -= gone
        self._counted = self.position

    def _take(self, chunk: bytes) -> None:
        self.is_end = not chunk
        pending = len(self._decoder.getstate()[0])
        try:
            self.text += self._decoder.decode(chunk, final=self.is_end)
        except UnicodeDecodeError as error:
            raise self._bad_encoding(error, self._num_bytes - pending) from None
        except UnicodeError:  # UTF-16 without its mark
            told = {"byte": self._num_bytes, "encoding": self.encoding.upper(), "path": self.name}
            raise UserError("data_not_utf8", where=f"{self.name}:1", fix="data_not_utf8", **told) from None
        self._num_bytes += len(chunk)

    def _bad_encoding(self, error: UnicodeDecodeError, offset: int) -> UserError:
        """`offset`: the place in the file of the first byte of the error's object."""
        content = bytes(error.object)
        line = self.line_number() + self.text.count("\n", self.position) + content.count(b"\n", 0, error.start)
        where = f"{self.name}:{line}"
        if error.reason in ("unexpected end of data", "incomplete multibyte sequence"):
            return UserError("data_cut_in_character", where=where, fix="data_cut")
        bad = content[content.rfind(b"\n", 0, error.start) + 1 :].partition(b"\n")[0]
        fix = "data_looks_gbk" if self.encoding == "utf-8" and _is_gbk(bad) else "data_not_utf8"
        values = {"byte": offset + error.start, "encoding": self.encoding.upper(), "path": self.name}
        return UserError("data_not_utf8", where=where, fix=fix, **values)


def _is_gbk(line: bytes) -> bool:
    """Return whether a line reads as Chinese text in GBK; one that a chunk cuts is judged without its last byte."""
    for end in (len(line), len(line) - 1):
        try:
            text = line[:end].decode("gbk")
        except UnicodeDecodeError:
            continue
        return any("\u4e00" <= char <= "\u9fff" for char in text)
    return False


def _read_array(window: _Window, cursor: Cursor) -> Iterator[RawRow | RowError]:
    """Walk the elements of a top-level array, from the one behind the cursor's start on."""
    number = cursor.start.rows if cursor.start.byte else 0
    if number == 0:
        window.position += 1
        window.skip_blank()
        if window.rest() == "]":
            raise UserError("data_empty", where=window.name, fix="data_empty")
    while True:
        if number:
            window.skip_blank()
            if window.rest() != ",":
                break
            window.position += 1
            window.skip_blank()
        number += 1
        # Several rows on one line (json.dump writes all on the first): the number tells them apart.
        place = window.where()
        where = f"{place}#{number}" if cursor.last_place == place else place
        cursor.last_place = place
        yield _row_at(window, where, number)
    if window.rest() != "]":
        raise _not_json(window, json.JSONDecodeError("expected , or ]", window.text, window.position), number)
    window.position += 1
    window.skip_blank()
    if window.rest():
        raise _behind(window, "text behind the closing ]")


def _row_at(window: _Window, where: str, number: int) -> RawRow | RowError:
    """Decode the record at the window's position.

    Raises: UserError if no JSON value stands there.
    """
    try:
        return _as_row(where, window.record())
    except _Duplicate as error:
        return RowError("row_key_twice", where=where, fix="row_key_twice", name=str(error))
    except (json.JSONDecodeError, RecursionError) as error:
        raise _not_json(window, error, number) from None
    except ValueError as error:
        fix = "row_constant" if isinstance(error, _Constant) else "data_not_json"
        return RowError("row_not_json", where=where, fix=fix, problem=str(error), context="")


def _read_lines(window: _Window, cursor: Cursor) -> Iterator[RawRow | RowError]:
    """Read JSON lines, from the one behind the cursor's start on; a single object over several lines is one row.

    Raises: UserError if the first line is nothing like a row: then the file is something else.
    """
    number = cursor.start.rows if cursor.start.byte else 0
    while window.rest():
        line = window.line()
        content = line.strip(_WHITESPACE)
        if number == 0 and content.startswith("{") and (content == "{" or not content.endswith("}")):
            yield _row_at(window, window.where(), 1)
            window.skip_blank()
            if window.rest():
                raise _behind(window, "text behind the object")
            return
        number += 1
        may_be_cut = content.startswith("{") and window.is_last(line)
        row = _row_of(window, content, record=number if may_be_cut else None)
        if number == 1 and isinstance(row, RowError) and row.key == "row_not_json" and not content.startswith("{"):
            raise UserError("data_not_json", where=row.where, fix=row.fix, **row.values)
        window.position += len(line)
        yield row
        window.skip_blank()


def _row_of(window: _Window, line: str, *, record: int | None) -> RawRow | RowError:
    """Decode one line; a fault in it is the row's. `record`: its number if it is the file's last, which may be cut."""
    where, start = window.where(), window.text.index(line, window.position)
    try:
        return _as_row(where, _STRICT.decode(line))
    except _Duplicate as error:
        return RowError("row_key_twice", where=where, fix="row_key_twice", name=str(error))
    except _Constant as error:
        constant = _CONSTANT.search(line)
        at, problem, fix = constant.start(1) if constant else 0, str(error), "row_constant"
    except json.JSONDecodeError as error:
        at, problem, fix = error.pos, error.msg, _fix_of(line, error.pos)
        if record is not None and _is_cut(line[at:], error):
            return RowError("data_cut", where=window.where(start + at), fix="data_cut", record=record)
    except RecursionError:
        at, problem, fix = 0, "nested too deeply", "data_not_json"
    except ValueError as error:
        at, problem, fix = 0, str(error), "data_not_json"
    return RowError("row_not_json", where=window.where(start + at), fix=fix, problem=problem, context=_around(line, at))


def _as_row(where: str, value: Any) -> RawRow | RowError:
    if not isinstance(value, dict):
        return RowError("row_not_object", where=where, fix="row_not_object", kind=kind_of(value))
    return RawRow(where, value)


def _not_json(window: _Window, error: json.JSONDecodeError | RecursionError, record: int) -> UserError:
    """Return the error with line, column and the text there."""
    at, problem = window.position, "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        at, problem = error.pos, error.msg
    # The fault is at the end of the file, or in a last line that nothing closes: the file was cut.
    rest = window.text[at:].rstrip()
    if window.is_end and "\n" not in rest and _is_cut(rest, error):
        return UserError("data_cut", where=window.where(at), fix="data_cut", record=record)
    context = _around(window.text, at)
    return UserError(
        "data_not_json", where=window.where(at), fix=_fix_of(window.text, at), problem=problem, context=context
    )


def _is_cut(rest: str, error: ValueError | RecursionError) -> bool:
    """Return whether a file that ends with `rest`, from its fault on, ends too early."""
    is_behind = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
    return not is_behind and not rest.rstrip().endswith(("]", "}"))


def _fix_of(text: str, at: int) -> str:
    """Return the advice for a fault at a place."""
    return "data_comment" if text.startswith(("//", "/*", "#"), at) else "data_not_json"


def _behind(window: _Window, problem: str) -> UserError:
    at = window.position
    context = _around(window.text, at)
    return UserError("data_not_json", where=window.where(at), fix="data_not_json", problem=problem, context=context)


def _around(text: str, at: int) -> str:
    """Return the text about a place, of its line alone."""
    start = max(text.rfind("\n", 0, at) + 1, at - 30)
    return (text[start : at + 30].splitlines() or [""])[0]


def kind_of(value: Any) -> str:
    """Return the JSON name of a value's type.

    >>> kind_of(3), kind_of(None), kind_of([])
    ('number', 'null', 'list')
    """
    names = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
