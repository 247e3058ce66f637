"""JSON → rows: every row has the line where it stands, and what is not JSON is refused where it stands."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truetune.data import json_rows
from truetune.data.json_rows import kind_of, read_json
from truetune.errors import RowError, UserError
from truetune.records import RawRow

ROWS = [{"id": n, "instruction": f"问题 {n}", "output": 'quote " comma , brace } bracket ]'} for n in range(5)]


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


LAYOUTS: dict[str, str] = {
    "array": _dumps(ROWS),
    "array, indented": _dumps(ROWS, indent=4),
    "array, a row a line": "[\n" + ",\n".join(map(_dumps, ROWS)) + "\n]\n",
    "array, commas first": "\n\n[ " + "\n\n  , ".join(map(_dumps, ROWS)) + "]",
    "array, CRLF": _dumps(ROWS, indent=1).replace("\n", "\r\n"),
    "array, BOM": "\ufeff" + _dumps(ROWS, indent=1),
    "lines": "\n".join(map(_dumps, ROWS)),
    "lines, blank lines": "\n\n" + "\n \t\n\n".join(map(_dumps, ROWS)) + "\n\n\n",
    "lines, CRLF": "".join(_dumps(row) + "\r\n" for row in ROWS),
    "lines, BOM": "\ufeff" + "".join(_dumps(row) + "\n" for row in ROWS),
    "lines, indented": "".join("\t " + _dumps(row) + " \n" for row in ROWS),
}


def _lines(content: str) -> list[int]:
    """The line of each row's opening brace, found by the row's id."""
    starts = [content.rindex("{", 0, match.start()) for match in re.finditer(r'"id": \d', content)]
    return [content.count("\n", 0, start) + 1 for start in starts]


def _read(path: Path, content: str | bytes) -> list[RawRow | RowError]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with path.open("rb") as stream:
        return list(read_json(str(path), stream))


def _fault(path: Path, content: str | bytes) -> UserError | RowError:
    """The fault of the file, or of its only bad row."""
    try:
        rows = _read(path, content)
    except UserError as error:
        return error
    (refused,) = (row for row in rows if isinstance(row, RowError))
    return refused


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.txt"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_their_lines(layout: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    read = _read(path, LAYOUTS[layout])
    lines = _lines(LAYOUTS[layout])
    assert len(read) == len(lines) == len(ROWS)
    # A row on the line of the one before it carries its number, too.
    numbers = [f"#{n}" if n > 1 and line == lines[n - 2] else "" for n, line in enumerate(lines, start=1)]
    places = [f"{path}:{line}{number}" for line, number in zip(lines, numbers, strict=True)]
    assert read == [RawRow(place, row) for place, row in zip(places, ROWS, strict=True)]


def test_layouts_put_rows_on_different_lines() -> None:
    assert len({tuple(_lines(content)) for content in LAYOUTS.values()}) == 6


def test_one_object_over_several_lines_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    assert _read(path, "\n\n" + _dumps(ROWS[0], indent=2) + "\n") == [RawRow(f"{path}:3", ROWS[0])]


TEXTS = [
    "2024-01-02",
    "12:30",
    "007",
    "1e5",
    "0x10",
    "1_000",
    "true",
    "null",
    "NaN",
    "no",
    " a ",
    "\u2028\u2029\x85\x0b\x0c",
]
TEXTS += ["\ufeff", "e\u0301 é", "\U0001f469\u200d\U0001f680", "שלום", '\x7f\t\r\n\\"/', "\U000f0000"]


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("is_array", [False, True])
def test_text_stays_as_it_is(is_array: bool, ascii_only: bool, tmp_path: Path) -> None:
    rows = [{"id": value, value: [value, {"deep": value}]} for value in TEXTS]
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    content = "[" + ",\n".join(lines) + "]" if is_array else "\n".join(lines)
    path = tmp_path / "rows"
    read = _read(path, content)
    assert read == [RawRow(f"{path}:{number}", row) for number, row in enumerate(rows, start=1)]
    assert len(read) == 18


def test_values_keep_their_types(tmp_path: Path) -> None:
    values = {"a": 1e5, "b": 7, "c": True, "d": None, "e": [], "f": {}, "g": "7", "h": 10**40}
    (row,) = _read(tmp_path / "rows.json", _dumps([values]))
    assert isinstance(row, RawRow)
    assert {key: (type(value), value) for key, value in row.value.items()} == {
        key: (type(value), value) for key, value in values.items()
    }


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(JSON_VALUES, min_size=1, max_size=5),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
)
def test_reads_what_json_writes(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, ascii_only: bool
) -> None:
    rows = [{"first": "", "second": "", "value": value} for value in values]
    array = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode()
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode()
    path = tmp_path_factory.getbasetemp() / "property.json"
    for content in (array, lines):
        assert [row.value for row in _read(path, content) if isinstance(row, RawRow)] == rows


# "¦" marks the place that the fault names; it is taken out before the file is written.
NOT_JSON = {
    "comma before ]": ('[\n {"a": "é"},\n¦]\n', "Expecting value"),
    "comma after [": ('[¦, {"a": 1}]', "Expecting value"),
    "comment": ('[\n  {"a": 1},\n  ¦// 注释\n  {"a": 2}\n]', "Expecting value"),
    "comment first": ('¦// rows\n{"a": 1}\n', "Expecting value"),
    "not even nearly JSON": ("¦name,text\nx,y\n", "Expecting value"),
    "no comma between rows": ('[{"a": "你"}\n ¦{"a": 2}]', "expected , or ]"),
    "no bracket at the end of a list": ('[\n {"a": ["你", 2 ¦}\n]\n', "Expecting ',' delimiter"),
    "no value": ('{"a": 1}\n{"a": ¦}\n{"a": 3}\n', "Expecting value"),
    "single quotes": ("\n[{¦'a': 1}]", "Expecting property name enclosed in double quotes"),
    "number 007": ('[{"a": 0¦07}]', "Expecting ',' delimiter"),
    "tab inside text": ('\n\r\n{"a": "x¦\ty"}\n', "Invalid control character at"),
    "two objects on a line": ('{"a": 1} ¦{"a": 2}\n', "Extra data"),
    "array behind an array": ('[{"a": 1}]\n¦[{"a": 2}]', "text behind the closing ]"),
    "after a BOM": ('\ufeff{"a": 1}\n{¦a: 1}', "Expecting property name enclosed in double quotes"),
    "a long line": ('[{"a": "' + "0123456789" * 4 + '" ¦x ' + "y" * 40 + "]", "Expecting ',' delimiter"),
}


LINES_ALONE = {"no value", "tab inside text", "two objects on a line", "after a BOM"}
"""Faults of one of the JSON lines: the others can be used."""


def _place(folder: Path, marked: str) -> tuple[str, str]:
    """The place of the mark, and what the message shows of its line: 30 characters before and after."""
    before, after = marked.removeprefix("\ufeff").split("¦")
    lines = before.split("\n")
    where = f"{folder / 'rows.json'}:{len(lines)}:{len(lines[-1]) + 1}"
    return where, lines[-1][-30:] + after.split("\n")[0][:30]


@pytest.mark.parametrize("case", NOT_JSON)
def test_not_json_names_line_and_column(case: str, tmp_path: Path, assert_fault: Callable[..., None]) -> None:
    marked, problem = NOT_JSON[case]
    where, context = _place(tmp_path, marked)
    error = _fault(tmp_path / "rows.json", marked.replace("¦", ""))
    key = "row_not_json" if isinstance(error, RowError) else "data_not_json"
    assert (key == "row_not_json") == (case in LINES_ALONE)
    fix = "data_comment" if "comment" in case else "data_not_json"
    assert_fault(error, key, fix=fix, where=where, problem=problem, context=context)


CUT = {
    "no closing bracket": ('[\n{"a": 1},\n{"a": 2}¦', 2),
    "no closing bracket, newline": ('[\n{"a": 1},\n{"a": 2}\n¦', 2),
    "after a comma": ('[{"a": 1},\n¦', 2),
    "only a bracket": ("[¦", 1),
    "after a key": ('[{"a": 1}, {"a": 2}, {"a"¦', 3),
    "after a colon": ('[{"a": "你"}, {"a":¦', 2),
    "inside a text": ('[{"a": 1}, {"a": ¦"hel', 2),
    "inside a word": ('{"a": 1}\n{"a": ¦tru', 2),
    "inside a list": ('[{"a": [1, 2¦', 1),
    "line, after a colon": ('{"a": 1}\n{"a":¦', 2),
    "line, after a value": ('{"a": 1}\n{"a": 2}\n{"a": 3¦\n', 3),
}


@pytest.mark.parametrize("case", CUT)
def test_cut_file(case: str, tmp_path: Path, assert_fault: Callable[..., None]) -> None:
    marked, record = CUT[case]
    error = _fault(tmp_path / "rows.json", marked.replace("¦", ""))
    assert_fault(error, "data_cut", where=_place(tmp_path, marked)[0], record=record)


def test_cut_inside_a_character(tmp_path: Path, assert_fault: Callable[..., None]) -> None:
    path = tmp_path / "rows.json"
    error = _fault(path, '{"a": 1}\n{"a": "你'.encode()[:-1])
    assert_fault(error, "data_cut_in_character", fix="data_cut", where=f"{path}:2")


HARD = {
    "nested too deeply": ('[{"a":' + "[" * 100_000 + "]" * 100_000 + "}]", "data_not_json"),
    "key twice and broken": ('[{"a":{"x":1,"x":2},"b":}]', "data_not_json"),
    "single object with a fault": ('{\n "a": 1,\n "b": ,\n "c": 2\n}', "data_not_json"),
}


@pytest.mark.parametrize("case", HARD)
def test_hard_faults_are_named_where_they_are(case: str, tmp_path: Path) -> None:
    content, key = HARD[case]
    error = _fault(tmp_path / "rows.json", content)
    assert error.key == key
    assert isinstance(error, UserError)
    if case == "single object with a fault":
        assert error.where.endswith(":3:7")


def test_single_object_with_a_key_twice_is_one_refused_row(tmp_path: Path) -> None:
    (row,) = _read(tmp_path / "rows.json", '{\n "a": 1,\n "a": 2\n}')
    assert isinstance(row, RowError)
    assert row.key == "row_key_twice"


def test_rows_before_a_fault_are_yielded(tmp_path: Path) -> None:
    read = []
    with pytest.raises(UserError):
        read.extend(row.where for row in read_json("rows", io.BytesIO(b"[{},\n {},\n {'a': 1}]")))
    assert read == ["rows:1", "rows:2"]


def test_rows_after_a_bad_line_are_read(tmp_path: Path) -> None:
    rows = _read(tmp_path / "rows", '{"a": 1}\n{"a": }\n\n{"a": NaN}\n[1, 2\n{"a": 2}\n')
    assert [getattr(row, "key", None) for row in rows] == [None, *["row_not_json"] * 3, None]
    assert [row.where.removeprefix(str(tmp_path)) for row in rows] == [
        *("/rows:1", "/rows:2:7", "/rows:4:7", "/rows:5:6", "/rows:6")
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_change_nothing(layout: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the pieces in which a file is read: inside characters, escapes, literals, numbers, line ends."""
    content = LAYOUTS[layout].encode()
    whole = list(read_json("rows", io.BytesIO(content)))
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", size)
    assert list(read_json("rows", io.BytesIO(content))) == whole
    assert len(whole) == len(ROWS)


@pytest.mark.parametrize("size", [1, 5, 64])
@pytest.mark.parametrize("case", NOT_JSON)
def test_chunks_change_no_fault(case: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = NOT_JSON[case][0].replace("¦", "")
    wanted = _fault(tmp_path / "rows.json", content)
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", size)
    found = _fault(tmp_path / "rows.json", content)
    assert (found.key, found.where, found.fix) == (wanted.key, wanted.where, wanted.fix)


def test_a_record_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", 10)
    monkeypatch.setattr(json_rows, "MAX_RECORD_CHARS", 1000)
    for content in (b'{"a": "' + b"x" * 5000 + b'"}\n', b'[{"a": "' + b"x" * 5000):
        with pytest.raises(UserError) as caught:
            list(read_json("rows", io.BytesIO(content)))
        assert (caught.value.key, caught.value.where) == ("data_record_large", "rows:1")


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("is_array", [False, True])
def test_constants_that_json_does_not_know(is_array: bool, name: str, tmp_path: Path) -> None:
    content = f'{{"a": 1}},\n{{"a": {name}}}]' if is_array else f'{{"a": 1}}\n{{"a": {name}}}\n'
    error = _fault(tmp_path / "rows.json", "[" + content if is_array else content)
    assert isinstance(error, RowError)
    assert (error.key, error.values["problem"]) == ("row_not_json", f"{name} is not JSON")
    assert error.where.startswith(f"{tmp_path / 'rows.json'}:2")


@pytest.mark.parametrize("content", ["", " \n\t\r\n", "\ufeff", "[]", "\n[ \n ]\n", "\ufeff[]"])
def test_empty_file(content: str, tmp_path: Path, assert_fault: Callable[..., None]) -> None:
    assert_fault(_fault(tmp_path / "rows.json", content), "data_empty", where=str(tmp_path / "rows.json"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16(encoding: str, tmp_path: Path, assert_fault: Callable[..., None]) -> None:
    content = _dumps(ROWS) if encoding == "utf-16" else "\ufeff" + _dumps(ROWS)
    path = str(tmp_path / "rows.json")
    assert_fault(_fault(Path(path), content.encode(encoding)), "data_utf16", where=path, path=path)


@pytest.mark.parametrize(
    ("content", "line", "byte"),
    [
        (b'{"a": 1}\n\n{"a": "\xff"}', 3, 17),
        (b"\x80", 1, 0),
        ('[\n{"a": "你好"}]'.encode("gbk"), 2, 9),
    ],
)
def test_not_utf8(content: bytes, line: int, byte: int, tmp_path: Path, assert_fault: Callable[..., None]) -> None:
    path = tmp_path / "rows.json"
    assert len(content[:byte].decode().split("\n")) == line
    fix = "data_looks_gbk" if line == 2 else "data_not_utf8"
    values = {"byte": byte, "path": str(path), "encoding": "UTF-8"}
    assert_fault(_fault(path, content), "data_not_utf8", fix=fix, where=f"{path}:{line}", **values)


@pytest.mark.parametrize("encoding", ["gbk", "utf-16", "big5", "cp1252"])
def test_another_encoding(encoding: str, tmp_path: Path) -> None:
    rows = [{"a": "café"}] if encoding == "cp1252" else [{"a": "你好，世界"}] * 3
    content = _dumps(rows, indent=1).encode(encoding)
    read = list(read_json("rows", io.BytesIO(content), encoding=encoding))
    assert [getattr(row, "value", None) for row in read] == rows
    bad = content[:-3] + b"\xff\xff\xff"
    with pytest.raises(UserError) as caught:
        list(read_json("rows", io.BytesIO(bad), encoding="utf-8" if encoding == "cp1252" else encoding))
    assert caught.value.key in ("data_not_utf8", "data_not_json", "data_utf16", "data_cut_in_character")


BAD_ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "key twice": ('{"a": 1, "b": 2, "b": 2, "a": 3}', "row_key_twice", {"name": "b"}),
    "key twice, inside": ('{"a": [{"x": 1, "x": 2}], "b": 2}', "row_key_twice", {"name": "x"}),
    "key twice, escaped": ('{"a": 1, "\\u0061": 2}', "row_key_twice", {"name": "a"}),
    "number": ("17", "row_not_object", {"kind": "number"}),
    "fraction": ("-1.5e3", "row_not_object", {"kind": "number"}),
    "text": ('"a text"', "row_not_object", {"kind": "text"}),
    "null": ("null", "row_not_object", {"kind": "null"}),
    "true": ("true", "row_not_object", {"kind": "boolean"}),
}


@pytest.mark.parametrize("layout", ["[\n{good},\n{bad},\n{good}\n]", "{good}\n{bad}\n{good}\n"])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_between_good_ones(case: str, layout: str, tmp_path: Path, assert_fault: Callable[..., None]) -> None:
    bad, key, values = BAD_ROWS[case]
    path = tmp_path / "rows.json"
    content = layout.replace("{good}", '{"id": 1}').replace("{bad}", bad)
    line = content.split("\n").index(next(part for part in content.split("\n") if bad in part)) + 1
    read = _read(path, content)
    assert [type(row) for row in read] == [RawRow, RowError, RawRow]
    assert [row.where for row in read] == [f"{path}:{line - 1}", f"{path}:{line}", f"{path}:{line + 1}"]
    assert isinstance(read[1], RowError)
    assert_fault(read[1], key, where=f"{path}:{line}", **values)


def test_list_as_a_row(tmp_path: Path, assert_fault: Callable[..., None]) -> None:
    path = tmp_path / "rows.json"
    good, bad = _read(path, '[{"id": 1},\n[{"id": 2}]]')
    assert isinstance(good, RawRow)
    assert isinstance(bad, RowError)
    assert_fault(bad, "row_not_object", where=f"{path}:2", kind="list")


def test_every_fault_of_the_module_is_met_above() -> None:
    named = set(re.findall(r'(?:User|Row)Error\(\s*"(\w+)"', Path(str(json_rows.__file__)).read_text()))
    met = {"data_not_json", "data_cut", "data_cut_in_character", "data_empty", "data_utf16", "data_not_utf8"}
    met |= {key for _, key, _ in BAD_ROWS.values()} | {"row_not_json", "data_record_large"}
    assert met == named
    assert len(named) >= 10


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (3, "number"),
        (-1.5, "number"),
        (0, "number"),
        (True, "boolean"),
        (False, "boolean"),
        (None, "null"),
        ([], "list"),
        ({}, "object"),
        ("", "text"),
    ],
)
def test_kind_of(value: Any, kind: str) -> None:
    assert kind_of(value) == kind
    assert kind_of(json.loads(json.dumps(value))) == kind


def test_a_number_too_long_for_python(tmp_path: Path) -> None:
    """Python reads no integer of more than 4,300 digits: that row is refused, the others are read."""
    bad, good = '{"a": ' + "9" * 5000 + "}", '{"a": 1}'
    for content in (f"[{good},\n{bad},\n{good}]", f"{good}\n{bad}\n{good}\n"):
        rows = _read(tmp_path / "rows.json", content)
        assert [getattr(row, "key", None) for row in rows] == [None, "row_not_json", None]
        assert rows[1].where.startswith(f"{tmp_path / 'rows.json'}:2")


def test_columns_count_what_stands_before(tmp_path: Path) -> None:
    """White space before a line's row, and no byte-order mark."""
    assert _fault(tmp_path / "a", '{"a": 1}\n   {"a": }\n').where == f"{tmp_path / 'a'}:2:10"
    assert _fault(tmp_path / "a", "\ufeff[{'a': 1}]").where == f"{tmp_path / 'a'}:1:3"


def test_a_line_that_is_no_json_at_all(tmp_path: Path) -> None:
    assert _fault(tmp_path / "a", "<html></html>").key == "data_not_json"


def test_utf16_without_its_mark() -> None:
    with pytest.raises(UserError) as caught:
        list(read_json("rows", io.BytesIO(b"[1]"), encoding="utf-16"))
    assert caught.value.key == "data_not_utf8"


def test_number_sign_in_a_path() -> None:
    rows = list(read_json("set#1/rows", io.BytesIO(b'[{"a": 1}, {"a": 2}, {"a": 3}]')))
    assert [row.where for row in rows] == ["set#1/rows:1", "set#1/rows:1#2", "set#1/rows:1#3"]
