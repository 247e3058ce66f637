"""From any place between two rows, reading goes on to the same rows: every kind of file, every place."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from truetune.data import json_rows, sources
from truetune.data.mark import Cursor, Mark
from truetune.data.sources import Source, read_rows
from truetune.errors import RowError, UserError
from truetune.records import RawRow

ROWS: list[dict[str, Any]] = [
    {"instruction": f"Größe {n}? 多大\n“{n}”", "output": "𝄞é" * (n % 7) + f" {n}"} for n in range(23)
]


def lines(path: Path) -> None:
    """JSON lines with blank ones between, a fault, and a mark of the encoding at the start."""
    texts = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    texts[5], texts[9] = texts[5][:-4], '{"a": 1, "a": 2}'
    path.write_bytes("\ufeff".encode() + "\n\n \n".join(texts).encode() + b"\n")


def array(indent: int | None) -> Callable[[Path], None]:
    """A JSON array; without an indent all on one line."""
    return lambda path: path.write_text(json.dumps([*ROWS, 7, *ROWS], ensure_ascii=False, indent=indent)) and None


def table(path: Path) -> None:
    """CSV with line breaks inside fields, and a row of too many fields."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(ROWS[0])
        writer.writerows([*(row.values() for row in ROWS), ("a", "b", "c"), ("d", "e")])


def compressed(path: Path) -> None:
    """JSON lines in gzip."""
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in ROWS).encode()))


def columns(path: Path) -> None:
    """Parquet in row groups of four."""
    parquet.write_table(pa.Table.from_pylist(ROWS), str(path), row_group_size=4)


KINDS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "lines": ("a.jsonl", lines),
    "array on one line": ("a.json", array(None)),
    "array on many lines": ("a.json", array(1)),
    "one object": ("a.json", lambda path: path.write_text(json.dumps(ROWS[0], indent=1)) and None),
    "csv": ("a.csv", table),
    "gzip": ("a.jsonl.gz", compressed),
    "parquet": ("a.parquet", columns),
}


def told(rows: Any) -> list[tuple[Any, ...]]:
    """Rows as values, refused ones with all that is said of them."""
    return [
        (row.where, row.value) if isinstance(row, RawRow) else (row.where, row.key, row.fix, str(row)) for row in rows
    ]


@pytest.mark.parametrize("chunk", [1 << 20, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_from_every_place_the_same_rows_follow(
    kind: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(sources, "PARQUET_ROWS", 3)
    name, write = KINDS[kind]
    write(tmp_path / name)
    source = Source(tmp_path / name)
    whole = told(read_rows(source))
    assert len(whole) == {"one object": 1, "csv": 25}.get(kind, len(whole))
    assert len(whole) >= 23 or kind == "one object"
    for count in range(len(whole) + 1):
        cursor = Cursor()
        rows = read_rows(source, cursor=cursor)
        assert told(islice(rows, count)) == whole[:count]
        mark = Mark(**json.loads(json.dumps(cursor.mark().to_dict())))
        assert mark.rows == count
        later = Cursor(mark)
        assert told(read_rows(source, cursor=later)) == whole[count:]
        assert later.rows == len(whole)
        if count in (1, len(whole)) and kind in ("lines", "array on one line"):
            # Found without reading what is before it.
            assert mark.byte > 0


@pytest.mark.parametrize("encoding", ["gbk", "utf-16"])
def test_other_encodings_are_counted(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(f'{{"text": "多大 {n}"}}' for n in range(9)).encode(encoding))
    whole = told(read_rows(Source(path), encoding=encoding))
    assert told(read_rows(Source(path), encoding=encoding, cursor=Cursor(Mark(4)))) == whole[4:]
    assert len(whole) == 9


def test_a_fault_behind_a_place_is_said_as_from_the_start(tmp_path: Path) -> None:
    """Line and column of a fault do not depend on where reading began."""
    for name, text in (("a.json", '[{"a": 1}, {"b": 2},\n {"c": 3}, oops]'), ("b.json", '[{"a": 1}, {"b": 2}, oops]')):
        path = tmp_path / name
        path.write_text(text)
        said = []
        for count in (0, 1, 2):
            cursor = Cursor()
            list(islice(read_rows(Source(path), cursor=cursor), count))
            with pytest.raises(UserError) as caught:
                list(read_rows(Source(path), cursor=Cursor(cursor.mark())))
            said.append(caught.value.where)
        assert len(set(said)) == 1
        assert said[0].count(":") == 2


def test_a_row_that_is_refused_counts_as_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n[]\n{"b": 2}\n')
    cursor = Cursor()
    rows = list(islice(read_rows(Source(path), cursor=cursor), 2))
    assert isinstance(rows[1], RowError)
    assert replace(cursor.mark(), byte=0, line=1, column=0) == Mark(2)
    assert told(read_rows(Source(path), cursor=Cursor(cursor.mark())))[0][1] == {"b": 2}
