"""Names → files → raw rows with their origin "file:line", strictly: what cannot be read is refused where it stands."""

from __future__ import annotations

import csv
import io
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from truetune.data.dataset_info import FILE_NAME, Names, read_info
from truetune.data.json_rows import read_json
from truetune.data.mark import Cursor
from truetune.errors import RowError, UserError
from truetune.hub import fetch
from truetune.records import RawRow

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
TEXTS = (".txt", ".md")
"""One text a file. Of a folder or a data set they are taken only if it has no rows: a README is no data."""
REFUSED_SUFFIXES = {
    ".zip": "data_archive",
    ".tar": "data_archive",
    ".xlsx": "data_sheet",
    ".xls": "data_sheet",
    ".bz2": "data_archive",
    ".xz": "data_archive",
}
MAX_EXPANSION, MIN_EXPANDED = 1000, 1 << 30
"""A compressed file that grows beyond both is taken for a bomb."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
HELD_OUT = {"test", "valid", "validation", "val", "dev", "eval", "evaluation"}
NO_ROWS = {FILE_NAME, "dataset_infos.json"}
MAX_FIELD_CHARS = 100_000_000
PARQUET_ROWS = 1024


@dataclass(frozen=True)
class Source:
    """A file of rows. `entry`: the place, among the names given, of the one that means it.

    `names`: how its rows' names become known ones, where a dataset_info.json says so.
    """

    path: Path
    names: Names | None = None
    entry: int = 0


def find_files(names: list[str], *, hub: str = "huggingface") -> list[Source]:
    """Return the data files that `names` mean; a folder means the data files in it, sorted.

    `dataset_info.json` means the files that it describes, `dataset_info.json:NAME` one of them; `owner/name` the
    training files of a data set on a hub, `owner/name:SPLIT` those with SPLIT in their names.

    Raises: UserError if a name does not exist, is no regular file, or a folder holds no data file.
    """
    files: list[Source] = []
    for entry, name in enumerate(names):
        path = Path(name).expanduser()
        info, _, chosen = name.partition(f"{FILE_NAME}:")
        if path.name == FILE_NAME or chosen:
            described = Path(info).expanduser() / FILE_NAME if chosen else path
            files += [Source(*found, entry) for found in read_info(described, chosen or None)]
        elif path.is_dir():
            found = _in_folder(path, SUFFIXES) or _in_folder(path, TEXTS)
            if not found:
                raise UserError("data_folder_empty", where=name, fix="data_folder_empty")
            files += [Source(file, entry=entry) for file in found]
        elif not path.exists() and _is_hub_id(name):
            files += [Source(file, entry=entry) for file in _hub_files(name, hub)]
        elif not path.exists():
            raise _missing(path)
        elif not path.is_file():
            raise UserError("data_not_file", where=name, fix="data_not_file")
        else:
            files.append(Source(path, entry=entry))
    return files


def _in_folder(folder: Path, kinds: tuple[str, ...]) -> list[Path]:
    return sorted(
        file for file in folder.iterdir() if _kind(file) in kinds and file.name != FILE_NAME and file.is_file()
    )


def _is_hub_id(name: str) -> bool:
    """Return whether a name looks like owner/name of a hub and like no path.

    >>> [_is_hub_id(name) for name in ("tatsu-lab/alpaca", "a/b:test", "data/rows.json", "src/truetune")]
    [True, True, False, False]
    """
    path = Path(name)
    return bool(HUB_ID.fullmatch(name)) and _kind(path) not in (*SUFFIXES, *TEXTS) and not path.parent.is_dir()


def _hub_files(name: str, hub: str) -> list[Path]:
    """Download a data set and return the files of the split that is asked for, else its training files, else all.

    Raises: UserError if there are none; a held-out split is never trained because there is no other.
    """
    owner, _, split = name.partition(":")
    folder = fetch(owner, revision="main", hub=hub, kind="dataset")
    found = sorted(file for file in folder.rglob("*") if file.is_file() and _kind(file) in SUFFIXES)
    names = {file: file.relative_to(folder).as_posix() for file in found if file.name not in NO_ROWS}
    words = {file: set(re.split(r"[/._-]", name.lower())) for file, name in names.items()}
    chosen = [file for file in names if (split or "train") in words[file]]
    if not split and not chosen:
        chosen = [file for file in names if not HELD_OUT & words[file]]
    if not chosen:
        raise UserError("data_hub_files", where=name, fix="data_hub_files", names=", ".join(names.values()) or "-")
    return chosen


def _kind(path: Path) -> str:
    """Return the suffix that tells what is inside: of rows.csv.gz, ".csv".

    >>> _kind(Path("rows.CSV.gz")), _kind(Path("rows.json"))
    ('.csv', '.json')
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _missing(path: Path) -> UserError:
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, names, n=1)
    if near:
        return UserError("data_missing", where=str(path), fix="data_did_you_mean", near=str(path.parent / near[0]))
    return UserError("data_missing", where=str(path), fix="data_missing", folder=str(path.parent.resolve()))


def read_rows(source: Source, *, encoding: str = "utf-8", cursor: Cursor | None = None) -> Iterator[RawRow | RowError]:
    """Yield each row of a file, or why it is refused: JSON, JSON lines, CSV, text (all packed, too) or Parquet.

    `cursor`: where to go on, if not at the beginning; it moves along.

    Raises: UserError if the file as a whole cannot be read, or changes while it is read.
    """
    names, cursor = source.names, cursor or Cursor()
    for row in _read_file(source.path, encoding, cursor):
        cursor.rows += 1
        yield row if names is None or isinstance(row, RowError) else RawRow(row.where, names.known(row.value))


def _read_file(path: Path, encoding: str, cursor: Cursor) -> Iterator[RawRow | RowError]:
    before = state_of(path)
    kind = _kind(path)
    if kind in REFUSED_SUFFIXES:
        raise UserError("data_kind", where=str(path), fix=REFUSED_SUFFIXES[kind], kind=kind, path=str(path))
    try:
        if kind == ".parquet":
            yield from _read_parquet(path, start=cursor.rows)
        else:
            with _open(path) as stream:
                if kind in (".csv", ".tsv"):
                    rows = _read_csv(path, stream, encoding, delimiter="\t" if kind == ".tsv" else ",")
                    yield from islice(rows, cursor.rows, None)
                elif kind in TEXTS:
                    yield from [_read_text(path, stream, encoding)][cursor.rows :]
                elif encoding == "utf-8" and path.suffix.lower() not in COMPRESSIONS:
                    yield from read_json(str(path), stream, cursor=cursor)
                else:
                    # Where characters are no fixed bytes of the file, rows are counted.
                    yield from islice(read_json(str(path), stream, encoding=encoding), cursor.rows, None)
    except (OSError, EOFError, pa.ArrowException) as error:
        raise UserError("data_unreadable", where=str(path), fix="data_unreadable", problem=error) from None
    if state_of(path) != before:
        raise UserError("data_changed", where=str(path), fix="data_changed")


def state_of(path: Path) -> tuple[int, int]:
    """Return size and time of change; a file that is written while it is read shows it here.

    Raises: UserError if it is no regular file, or cannot be opened.
    """
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            path.open("rb").close()
    except OSError as error:
        raise UserError("data_unreadable", where=str(path), fix="data_unreadable", problem=error) from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError("data_not_file", where=str(path), fix="data_not_file")
    return found.st_size, found.st_mtime_ns


class _Guarded(io.RawIOBase):
    """A decompressed stream that ends with an error where it grows beyond all measure."""

    def __init__(self, path: Path, stream: Any) -> None:
        self._path, self._stream, self._num_bytes = path, stream, 0
        self._most = max(MIN_EXPANDED, MAX_EXPANSION * path.stat().st_size)

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, as many as were asked for unless the file ends."""
        chunk: bytes = self._stream.read(size)
        self._num_bytes += len(chunk)
        if self._num_bytes > self._most:
            raise UserError("data_bomb", where=str(self._path), fix="data_bomb", gigabytes=self._most / 2**30)
        return chunk

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer (for text readers)."""
        chunk = self.read(len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _open(path: Path) -> IO[bytes]:
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    return _Guarded(path, pa.input_stream(str(path), compression=compression))  # type: ignore[return-value]


def _read_csv(path: Path, stream: IO[bytes], encoding: str, *, delimiter: str) -> Iterator[RawRow | RowError]:
    """Read RFC 4180: a header, quoted fields that may hold line breaks. All values stay text."""
    codec = "utf-8-sig" if encoding == "utf-8" else encoding
    with io.TextIOWrapper(_buffered(stream), encoding=codec, newline="") as text:
        csv.field_size_limit(MAX_FIELD_CHARS)
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            yield from _csv_rows(path, reader, delimiter)
        except csv.Error as error:
            raise UserError("data_csv", where=f"{path}:{reader.line_num}", fix="data_csv", problem=error) from None
        except UnicodeError:
            raise _bad_text(path, encoding) from None


def _bad_text(path: Path, encoding: str) -> UserError:
    """Return the error of the first line that is not in an encoding: a text reader decodes far ahead of it."""
    number, offset = 0, 0
    with _open(path) as stream:
        for content in _buffered(stream):
            number += 1
            try:
                content.decode(encoding)
            except UnicodeError as error:
                offset += getattr(error, "start", 0)
                break
            offset += len(content)
    told = {"byte": offset, "encoding": encoding.upper(), "path": str(path)}
    return UserError("data_not_utf8", where=f"{path}:{max(number, 1)}", fix="data_not_utf8", **told)


def _buffered(stream: IO[bytes]) -> IO[bytes]:
    return io.BufferedReader(stream) if isinstance(stream, io.RawIOBase) else stream


def _read_text(path: Path, stream: IO[bytes], encoding: str) -> RawRow:
    """Read a file as one text, character by character as it is."""
    content = _buffered(stream).read(MAX_FIELD_CHARS + 1)
    if len(content) > MAX_FIELD_CHARS:
        raise UserError("data_record_large", where=f"{path}:1", fix="data_text_large", most=MAX_FIELD_CHARS)
    try:
        return RawRow(f"{path}:1", {"text": content.decode("utf-8-sig" if encoding == "utf-8" else encoding)})
    except UnicodeError:
        raise _bad_text(path, encoding) from None


def _csv_rows(path: Path, reader: Any, delimiter: str) -> Iterator[RawRow | RowError]:
    header: list[str] = next(reader, [])
    if not any(header):
        raise UserError("data_empty", where=str(path), fix="data_empty")
    is_divided_otherwise = len(header) == 1 and delimiter == "," and ";" in header[0]
    if is_divided_otherwise or len(set(header)) < len(header):
        fix = "data_csv_semicolon" if is_divided_otherwise else "data_csv_header"
        raise UserError("data_csv_header", where=f"{path}:1", fix=fix, found=", ".join(header))
    line = reader.line_num + 1
    for values in reader:
        where, line = f"{path}:{line}", reader.line_num + 1
        if len(values) == len(header):
            yield RawRow(where, dict(zip(header, values, strict=True)))
        elif values:
            counts = {"found": len(values), "expected": len(header)}
            yield RowError("row_csv_fields", where=where, fix="row_csv_fields", **counts)


def _read_parquet(path: Path, *, start: int) -> Iterator[RawRow]:
    """Read the rows of a Parquet file behind the first `start`; "file:number" of the row, since there are no lines."""
    from pyarrow import parquet

    with parquet.ParquetFile(str(path)) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        ends = list(accumulate(sizes))
        groups = [group for group, end in enumerate(ends) if end > start]
        number = ends[groups[0]] - sizes[groups[0]] if groups else start
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=groups) if groups else ():
            num_skipped = min(max(start - number, 0), len(batch))
            number += num_skipped
            for value in batch.slice(num_skipped).to_pylist():
                number += 1
                # A column that a row does not fill is null: the same as if the row had no such key.
                yield RawRow(f"{path}:{number}", _without_nulls(value))


def _without_nulls(value: Any) -> Any:
    """Return a value without the keys that are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
