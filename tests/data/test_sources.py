"""Names → files → rows: JSON, CSV, Parquet, compressed files; what is no data file is refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from truetune.data import sources
from truetune.data.sources import Source, read_rows
from truetune.errors import UserError
from truetune.records import RawRow

ROWS = [
    {"instruction": "2024-01-02", "output": "007"},
    {"instruction": 'a "quoted", text\r\nof two lines', "output": "1e5"},
    {"instruction": "你好 👩\u200d🚀", "output": " null "},
    {"instruction": "NaN", "output": "\u2028 tab\t end"},
]


def find_files(names: list[str]) -> list[Path]:
    return [source.path for source in sources.find_files(names)]


def _values(path: Path, **more: Any) -> list[Any]:
    return [row.value if isinstance(row, RawRow) else row.key for row in read_rows(Source(path), **more)]


def _fault(path: Path, **more: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        list(read_rows(Source(path), **more))
    return caught.value


def _csv(rows: list[dict[str, str]], *, delimiter: str = ",") -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _lines() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(path: Path) -> None:
    """Write ROWS in the kind of file that the name says."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        parquet.write_table(pa.Table.from_pylist(ROWS), str(path))
        return
    content = {
        "rows.json": json.dumps(ROWS, ensure_ascii=False).encode(),
        "rows.jsonl": _lines(),
        "rows.csv": _csv(ROWS).encode(),
        "bom.csv": ("\ufeff" + _csv(ROWS)).encode(),
        "rows.tsv": _csv(ROWS, delimiter="\t").encode(),
    }[name]
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = pa.Codec("zstd").compress(content, asbytes=True)
    path.write_bytes(content)


KINDS = ["rows.json", "rows.jsonl", "rows.csv", "bom.csv", "rows.tsv", "rows.parquet"]
KINDS += ["rows.json.gz", "rows.jsonl.zst", "rows.csv.gz", "rows.jsonl.gz"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    """Dates, numbers, null and NaN stay the text that they are."""
    path = tmp_path / name
    write(path)
    assert _values(path) == ROWS
    assert find_files([str(tmp_path)]) == [path]


def test_rows_of_a_csv_know_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write(path)
    assert [row.where for row in read_rows(Source(path))] == [f"{path}:{line}" for line in (2, 3, 5, 6)]
    path.write_text("a,b\n1,2\n\n3\n4,5,6\n7,8\n")
    rows = list(read_rows(Source(path)))
    assert [row.where for row in rows] == [f"{path}:{line}" for line in (2, 4, 5, 6)]
    assert [getattr(row, "key", None) for row in rows] == [None, "row_csv_fields", "row_csv_fields", None]


def test_csv_of_one_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text\n"abc, def"\n')
    assert _values(path) == [{"text": "abc, def"}]


def test_null_of_a_parquet_file_is_no_value(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist([{"a": "x", "b": None}, {"a": None, "b": "y"}]), str(path))
    assert _values(path) == [{"a": "x"}, {"b": "y"}]
    assert [row.where for row in read_rows(Source(path))] == [f"{path}:1", f"{path}:2"]


BAD_FILES: dict[str, tuple[bytes, str, str]] = {
    "rows.csv": (b"instruction;output\na;b\n", "data_csv_header", "data_csv_semicolon"),
    "twice.csv": (b"a,b,a\n1,2,3\n", "data_csv_header", "data_csv_header"),
    "quote.csv": (b'a,b\n1,"x" y\n', "data_csv", "data_csv"),
    "open.csv": (b'a,b\n1,"x\n', "data_csv", "data_csv"),
    "gbk.csv": ("a,b\n1,你好\n".encode("gbk"), "data_not_utf8", "data_not_utf8"),
    "empty.csv": (b"", "data_empty", "data_empty"),
    "rows.xlsx": (b"PK", "data_kind", "data_sheet"),
    "rows.zip": (b"PK", "data_kind", "data_archive"),
    "rows.parquet": (b"not parquet", "data_unreadable", "data_unreadable"),
    "rows.json.gz": (b"not gzip", "data_unreadable", "data_unreadable"),
    "cut.jsonl.gz": (gzip.compress(_lines())[:-20], "data_unreadable", "data_unreadable"),
    "empty.json": (b"", "data_empty", "data_empty"),
    "gbk.txt": ("你好\n你好".encode("gbk"), "data_not_utf8", "data_not_utf8"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name: str, tmp_path: Path) -> None:
    content, key, fix = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    error = _fault(path)
    assert (error.key, error.fix) == (key, fix)
    assert error.where.startswith(str(path))


def test_a_text_file_is_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Character by character as it is, packed or not; a byte order mark is none of it."""
    content = "# Title\r\n\n  two  spaces\t你好 \n"
    for name, written in {
        "a.txt": content.encode(),
        "b.MD": b"\xef\xbb\xbf" + content.encode(),
        "c.txt.gz": gzip.compress(content.encode()),
    }.items():
        (tmp_path / name).write_bytes(written)
        (row,) = read_rows(Source(tmp_path / name))
        assert (row.where, row.value) == (f"{tmp_path / name}:1", {"text": content})
    (tmp_path / "g.txt").write_bytes("你好".encode("gbk"))
    assert _values(tmp_path / "g.txt", encoding="gbk") == [{"text": "你好"}]
    monkeypatch.setattr(sources, "MAX_FIELD_CHARS", 10)
    assert (_fault(tmp_path / "a.txt").key, _fault(tmp_path / "a.txt").fix) == ("data_record_large", "data_text_large")


def test_a_folder_of_texts_is_data_and_a_readme_beside_rows_is_not(tmp_path: Path) -> None:
    for name in ("README.md", "b.txt", "a.md.gz"):
        (tmp_path / name).write_text("text")
    assert [file.name for file in find_files([str(tmp_path)])] == ["README.md", "a.md.gz", "b.txt"]
    (tmp_path / "rows.json").write_text("[]")
    assert [file.name for file in find_files([str(tmp_path)])] == ["rows.json"]


def test_encoding_of_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("a,b\n1,你好\n".encode("gbk"))
    assert _values(path, encoding="gbk") == [{"a": "1", "b": "你好"}]


def test_file_that_unpacks_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 500_000))
    monkeypatch.setattr(sources, "MIN_EXPANDED", 1 << 20)
    monkeypatch.setattr(sources, "MAX_EXPANSION", 10)
    assert _fault(path).key == "data_bomb"


def test_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """D51."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(_lines())
    rows = read_rows(Source(path))
    next(rows)
    with path.open("ab") as stream:
        stream.write(_lines())
    with pytest.raises(UserError) as caught:
        list(rows)
    assert caught.value.key == "data_changed"


def test_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(_lines())

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert _fault(path).key == "data_unreadable"


def test_folder_named_like_a_data_file_is_no_data_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    (tmp_path / "y.json").write_text("[]")
    assert find_files([str(tmp_path)]) == [tmp_path / "y.json"]


def test_find_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("b.json", "a.jsonl", "c.csv", "d.json.bak", "e.zip", "10.json", "9.json", "README"):
        (folder / name).touch()
    in_folder = [folder / name for name in ("10.json", "9.json", "a.jsonl", "b.json", "c.csv")]
    assert find_files([]) == []
    assert find_files([str(folder)]) == in_folder
    assert find_files([str(folder / "c.csv"), str(folder), str(folder / "b.json")]) == [
        folder / "c.csv",
        *in_folder,
        folder / "b.json",
    ]
    monkeypatch.setenv("HOME", str(folder))
    assert find_files(["~/b.json"]) == [folder / "b.json"]


NOT_FOUND: dict[str, tuple[str, str, dict[str, str]]] = {
    "trian.json": ("data_missing", "data_did_you_mean", {"near": "{0}/train.json"}),
    "train.jsonl": ("data_missing", "data_did_you_mean", {"near": "{0}/train.json"}),
    "zzzz": ("data_missing", "data_missing", {"folder": "{0}"}),
    "none/train.json": ("data_missing", "data_missing", {"folder": "{0}/none"}),
    "empty": ("data_folder_empty", "data_folder_empty", {}),
    "pipe": ("data_not_file", "data_not_file", {}),
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_find_files_refuses(name: str, tmp_path: Path, assert_fault: Callable[..., None]) -> None:
    key, fix, values = NOT_FOUND[name]
    (tmp_path / "train.json").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "rows.log").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError) as caught:
        find_files([str(tmp_path / "train.json"), str(tmp_path / name)])
    filled = {name: value.format(tmp_path.resolve()) for name, value in values.items()}
    assert_fault(caught.value, key, where=str(tmp_path / name), fix=fix, **filled)


def test_every_fault_of_the_module_is_met_above() -> None:
    named = set(re.findall(r'(?:User|Row)Error\(\s*"(\w+)"', Path(str(sources.__file__)).read_text()))
    met = {key for _, key, _ in BAD_FILES.values()} | {key for key, _, _ in NOT_FOUND.values()}
    assert named <= met | {"data_bomb", "data_changed", "row_csv_fields", "data_hub_files", "data_record_large"}
    assert len(named) >= 11
