"""Prepared rows on disk: written in batches, read through a memory map, one row at a time.

record   0      1      2      3      4              one for each pair
row      0      1      1      1      2              row 1: two turns and a rejected answer
starts   0      1                    4      5       records of row r: starts[r] to before starts[r + 1]
"""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from truetune.records import Pair, Row

BATCH_RECORDS = 8192

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("where", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),
        ("num_template_tokens", pa.int32()),
        ("is_rejected", pa.bool_()),
        # Of the row, only in its first record: 64 bits of its first prompt, of all its pairs and of its last answer;
        # the number of its file; whether it brings a system message; JSON of the messages before its last learned
        # turn, and that turn.
        ("prompt_hash", pa.uint64()),
        ("row_hash", pa.uint64()),
        ("answer_hash", pa.uint64()),
        ("source", pa.int32()),
        ("has_system", pa.bool_()),
        ("turns", pa.string()),
        # Of plain text that was split; the pieces of a text have its hash as prompt_hash.
        ("is_piece", pa.bool_()),
    ]
)


ONCE = ("where", "prompt_hash", "row_hash", "answer_hash", "source", "has_system", "turns", "is_piece")
"""Columns that only a row's first record has."""


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What is counted over all rows. `source`: number of the row's file; `has_system`: it brings a system message.

    `text_hash`: of the whole text, if the row is a piece of one; pieces of a text stay on one side. `is_compared`: its
    rejected answer matters, too.
    """

    source: int = 0
    has_system: bool = False
    text_hash: int | None = None
    is_compared: bool = False


class RecordBuilder:
    """Gathers rows; `build` makes records of them."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names if not name.endswith("_ids")}
        self._lists = [(array("i"), array("i", [0])) for _ in range(2)]

    def add(self, row: Row, facts: RowFacts = RowFacts()) -> None:
        """Append a row."""
        pairs = (*row.pairs, *(row.rejected if facts.is_compared else ()))
        row_hash = hash_of(*(ids for pair in pairs for ids in (pair.prompt_ids, pair.answer_ids)))
        once: dict[str, Any] = {
            "where": row.where,
            # Plain text has no prompt: what two texts begin with says nothing of them.
            "prompt_hash": hash_of(row.pairs[0].prompt_ids) if row.prompt else facts.text_hash or row_hash,
            "row_hash": row_hash,
            "answer_hash": hash_of(row.pairs[-1].answer_ids),
            "source": facts.source,
            "has_system": facts.has_system,
            "turns": json.dumps([*row.prompt, row.answer], ensure_ascii=False),
            "is_piece": facts.text_hash is not None,
        }
        for pair, is_rejected in [*((pair, False) for pair in row.pairs), *((pair, True) for pair in row.rejected)]:
            for ids, (values, ends) in zip((pair.prompt_ids, pair.answer_ids), self._lists, strict=True):
                values.extend(ids)
                ends.append(len(values))
            self._columns["row"].append(row.index)
            self._columns["num_template_tokens"].append(pair.num_template_tokens)
            self._columns["is_rejected"].append(is_rejected)
            for name in ONCE:
                self._columns[name].append(once.get(name))
            once = {}

    def build(self) -> pa.RecordBatch:
        """Return the records of the rows gathered so far."""
        lists = {
            name: pa.ListArray.from_arrays(np.frombuffer(ends, np.int32), pa.array(np.frombuffer(values, np.int32)))
            for name, (values, ends) in zip(("prompt_ids", "answer_ids"), self._lists, strict=True)
        }
        columns = {name: pa.array(values, SCHEMA.field(name).type) for name, values in self._columns.items()} | lists
        return pa.record_batch([columns[name] for name in SCHEMA.names], schema=SCHEMA)


class RowWriter:
    """Writes records to an Arrow file; `with` closes it."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.close()
        self._sink.close()

    def write(self, records: pa.RecordBatch) -> None:
        """Append the records of whole rows."""
        if len(records):
            self._writer.write_batch(records)


def shifted(records: pa.RecordBatch, shift: int) -> pa.RecordBatch:
    """Return records whose rows have their numbers raised by `shift`; all else is shared."""
    return records.set_column(0, SCHEMA.field(0), pc.add(records["row"], shift)) if shift else records


def hash_of(*parts: tuple[int, ...]) -> int:
    """Return 64 bits of a hash of ids: two of a million rows meet by chance once in 40 million data sets."""
    digest = hashlib.blake2b(digest_size=8)
    for ids in parts:
        digest.update(len(ids).to_bytes(4, "little"))
        digest.update(array("i", ids))
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True)
class _Records:
    """One batch of the file as numpy sees it: no copy but of `where` and `turns`, which are read when asked for."""

    batch: pa.RecordBatch

    @cached_property
    def rows(self) -> np.ndarray:
        values: np.ndarray = self.batch["row"].to_numpy()
        return values

    @cached_property
    def ids(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(offsets, values) of prompts, and of answers."""
        columns = [self.batch[name] for name in ("prompt_ids", "answer_ids")]
        return [(column.offsets.to_numpy(), column.values.to_numpy()) for column in columns]

    def lengths(self, column: int) -> np.ndarray:
        """Return the tokens of each record's prompt (0) or answer (1)."""
        return np.diff(self.ids[column][0])

    def tokens(self, column: int, record: int) -> tuple[int, ...]:
        """Return the ids of one record."""
        offsets, values = self.ids[column]
        return tuple(values[offsets[record] : offsets[record + 1]].tolist())


def _mapped(path: Path) -> list[_Records]:
    """Return the batches of an Arrow file, mapped into memory.

    Raises: MemoryError if none is left for Arrow's threads, which it calls an unknown error.
    """
    try:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            return [_Records(reader.get_batch(number)) for number in range(reader.num_record_batches)]
    except pa.ArrowException as error:
        if "Resource temporarily unavailable" in str(error):
            raise MemoryError(str(error)) from None
        raise


class _File:
    """Batches of rows: those of an Arrow file, or a few in memory."""

    def __init__(self, batches: list[_Records]) -> None:
        self.batches = batches
        self._columns: dict[str, np.ndarray] = {}
        self.batch_starts = np.cumsum([0, *(len(batch.rows) for batch in batches)]).tolist()
        rows = np.concatenate([batch.rows for batch in batches]) if batches else np.zeros(0, np.int64)
        self.starts = np.append(np.flatnonzero(np.diff(rows, prepend=-1)), len(rows))

    def lengths(self, *columns: int) -> np.ndarray:
        """Return the tokens of each record: of its prompt (0), its answer (1), or both together."""
        found = [sum(batch.lengths(column) for column in columns) for batch in self.batches]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def column(self, name: str) -> np.ndarray:
        """Return a column of all records; what only a row's first record has is zero in the others."""
        if name not in self._columns:
            self._columns[name] = self._read_column(name)
        return self._columns[name]

    def _read_column(self, name: str) -> np.ndarray:
        zero = False if pa.types.is_boolean(SCHEMA.field(name).type) else 0
        found = [batch.batch[name].fill_null(zero).to_numpy(zero_copy_only=False) for batch in self.batches]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def sequence(self, record: int) -> tuple[int, ...]:
        """Return the ids of one record."""
        at = bisect_right(self.batch_starts, record) - 1
        batch, local = self.batches[at], record - self.batch_starts[at]
        return batch.tokens(0, local) + batch.tokens(1, local)

    def taken(self, records: np.ndarray) -> pa.RecordBatch:
        """Return some records. Batch by batch: all of a large file's text is too much for one Arrow array (2 GB)."""
        places = np.searchsorted(self.batch_starts, records, side="right") - 1
        parts = np.split(np.arange(len(records)), np.flatnonzero(np.diff(places)) + 1)
        found = []
        for part in parts:
            at = int(places[part[0]])
            found.append(self.batches[at].batch.take(pa.array(records[part] - self.batch_starts[at])))
        return pa.concat_batches(found)

    def texts(self, name: str, records: np.ndarray) -> list[str]:
        """Return the texts of some records, in any order: each batch is asked once."""
        at = np.searchsorted(self.batch_starts, records, side="right") - 1
        order = np.argsort(at, kind="stable")
        found = np.empty(len(records), object)
        for part in np.split(order, np.flatnonzero(np.diff(at[order])) + 1):
            if len(part):
                number = int(at[part[0]])
                local = pa.array(records[part] - self.batch_starts[number])
                found[part] = self.batches[number].batch[name].take(local).to_pylist()
        texts: list[str] = found.tolist()
        return texts

    def row(self, number: int) -> Row:
        """Return the row at a place of the file."""
        pairs: list[Pair] = []
        rejected: list[Pair] = []
        for record in range(int(self.starts[number]), int(self.starts[number + 1])):
            at = bisect_right(self.batch_starts, record) - 1
            batch, local = self.batches[at], record - self.batch_starts[at]
            num_template_tokens = batch.batch["num_template_tokens"][local].as_py()
            pair = Pair(batch.tokens(0, local), batch.tokens(1, local), num_template_tokens)
            (rejected if batch.batch["is_rejected"][local].as_py() else pairs).append(pair)
        at = bisect_right(self.batch_starts, self.starts[number]) - 1
        batch, local = self.batches[at], int(self.starts[number] - self.batch_starts[at])
        *prompt, answer = json.loads(batch.batch["turns"][local].as_py())
        where = batch.batch["where"][local].as_py()
        return Row(int(batch.rows[local]), where, tuple(pairs), tuple(prompt), answer, tuple(rejected))


class StoredRows(Sequence[Row]):
    """Rows of a file, in the order of `numbers`; each is read when it is asked for.

    `is_compared`: rejected answers are learned from, too, so that they count among the learned pairs.
    """

    def __init__(
        self, path: Path, numbers: np.ndarray | None = None, *, file: _File | None = None, is_compared: bool = False
    ) -> None:
        self.path = path
        self.is_compared = is_compared
        self._file = file or _File(_mapped(path))
        self.numbers = np.arange(len(self._file.starts) - 1) if numbers is None else numbers

    @classmethod
    def of_batches(cls, batches: Iterable[pa.RecordBatch], *, is_compared: bool) -> StoredRows:
        """Return rows that are in memory alone; their numbers rise from batch to batch."""
        return cls(Path(), file=_File([_Records(batch) for batch in batches if len(batch)]), is_compared=is_compared)

    def followed_by(self, others: StoredRows) -> StoredRows:
        """Return all rows of two files as those of one, in memory; the second's numbers go on behind the first's."""
        own = [records.batch for records in self._file.batches]
        shift = int(own[-1]["row"][-1].as_py()) + 1 if own else 0
        more = (shifted(records.batch, shift) for records in others._file.batches)
        return StoredRows.of_batches([*own, *more], is_compared=self.is_compared)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> StoredRows: ...

    def __getitem__(self, index: int | slice) -> Row | StoredRows:
        if isinstance(index, slice):
            return self.chosen(self.numbers[index])
        return self._file.row(int(self.numbers[index]))

    def __iter__(self) -> Iterator[Row]:
        return (self._file.row(int(number)) for number in self.numbers)

    def chosen(self, numbers: np.ndarray) -> StoredRows:
        """Return other rows of the same file."""
        return StoredRows(self.path, numbers, file=self._file, is_compared=self.is_compared)

    def lengths(self, *columns: int) -> np.ndarray:
        """Return the tokens of each learned pair of these rows: of the prompt (0), the answer (1), or both together."""
        found: np.ndarray = self._file.lengths(*columns)[self._learned_records()]
        return found

    def total(self, name: str) -> int:
        """Return the sum of a column over all learned pairs of these rows."""
        return int(self._file.column(name)[self._learned_records()].sum())

    def _records(self) -> np.ndarray:
        """Return the numbers of the records of these rows, in order."""
        starts, stops = self._file.starts[self.numbers], self._file.starts[self.numbers + 1]
        counts = stops - starts
        return np.repeat(starts - np.append(0, counts.cumsum()[:-1]), counts) + np.arange(counts.sum())

    def _learned_records(self) -> np.ndarray:
        """Return those that are no rejected answers, or all of them where these are compared."""
        records = self._records()
        if self.is_compared:
            return records
        learned: np.ndarray = records[~self._file.column("is_rejected")[records].astype(bool)]
        return learned

    def of_rows(self, name: str) -> np.ndarray:
        """Return a column that each row has once."""
        found: np.ndarray = self._file.column(name)[self._file.starts[self.numbers]]
        return found

    def places(self) -> list[str]:
        """Return where each of these rows stands: "file:line"."""
        return self._file.texts("where", self._file.starts[self.numbers])

    def matching(self, text: str) -> np.ndarray:
        """Return the numbers of the rows whose place or last turns hold a text, its case ignored."""
        # The turns are stored as JSON, so the text is looked for as JSON writes it.
        quoted = json.dumps(text, ensure_ascii=False)[1:-1]
        found = [
            pc.or_(
                pc.match_substring(batch.batch["turns"].fill_null(""), quoted, ignore_case=True),
                pc.match_substring(batch.batch["where"].fill_null(""), text, ignore_case=True),
            ).to_numpy(zero_copy_only=False)
            for batch in self._file.batches
        ]
        is_found = np.concatenate(found) if found else np.zeros(0, bool)
        numbers: np.ndarray = self.numbers[is_found[self._file.starts[self.numbers]]]
        return numbers

    def highest_id(self) -> int:
        """Return the highest token id of the file, -1 if it has none."""
        return max((int(part[1].max(initial=-1)) for batch in self._file.batches for part in batch.ids), default=-1)

    def sequences(self) -> Iterator[tuple[int, ...]]:
        """Yield the ids of each learned pair, prompt and answer in one."""
        return map(self._file.sequence, self._learned_records().tolist())

    def longest_pairs(self) -> np.ndarray:
        """Return the tokens of each row's longest learned pair."""
        if not len(self):
            return np.zeros(0, np.int64)
        is_unused = self._file.column("is_rejected").astype(bool) & (not self.is_compared)
        lengths = np.where(is_unused, 0, self._file.lengths(0, 1))
        longest: np.ndarray = np.maximum.reduceat(lengths, self._file.starts[:-1])[self.numbers]
        return longest

    def update_hash(self, digest: hashlib._Hash) -> None:
        """Feed the token ids of the file, and which rows these are, to a hash."""
        for batch in self._file.batches:
            for values in (batch.rows, *(part for column in batch.ids for part in column)):
                digest.update(np.ascontiguousarray(values).data)
        digest.update(f"{len(self)} rows;".encode())
        digest.update(self.numbers.astype(np.int64).tobytes())

    def write(self, path: Path) -> None:
        """Write these rows as a file of their own."""
        records = self._records()
        with RowWriter(path) as writer:
            for start in range(0, len(records), BATCH_RECORDS):
                writer.write(self._file.taken(records[start : start + BATCH_RECORDS]))
