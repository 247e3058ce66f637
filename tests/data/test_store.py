"""Rows that are written and read are the same rows; what is counted from columns is what the rows say."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from truetune.data import store
from truetune.data.store import SCHEMA, RecordBuilder, RowFacts, RowWriter, StoredRows
from truetune.records import Pair, Row

DRAWS = np.random.default_rng(0)


def _pair(length: int) -> Pair:
    ids = DRAWS.integers(0, 2**31, size=length).tolist()
    cut = int(DRAWS.integers(0, length))
    return Pair(tuple(ids[:cut]), tuple(ids[cut:]), cut % 5)


def _row(number: int) -> Row:
    pairs = tuple(_pair(int(DRAWS.integers(1, 40))) for _ in range(1 + number % 3))
    rejected = (_pair(7),) if number % 4 == 0 else ()
    prompt = ({"role": "user", "content": f"问 {number}"},)
    return Row(number * 2, f"行.json:{number}", pairs, prompt, "答\n", rejected)


ROWS = [_row(number) for number in range(50)]


def _write(path: Path, rows: Sequence[Row], facts: Sequence[RowFacts], *, batch_rows: int = 100) -> None:
    with RowWriter(path) as writer:
        for start in range(0, len(rows), batch_rows):
            builder = RecordBuilder()
            for row, some in list(zip(rows, facts, strict=True))[start : start + batch_rows]:
                builder.add(row, some)
            writer.write(builder.build())
            writer.write(RecordBuilder().build())


@pytest.fixture(params=[1, 7, 8192])
def stored(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoredRows:
    """ROWS in a file, in batches of some size."""
    monkeypatch.setattr(store, "BATCH_RECORDS", request.param)
    facts = [RowFacts(source=number % 2, has_system=number % 5 == 0) for number in range(len(ROWS))]
    _write(tmp_path / "rows.arrow", ROWS, facts, batch_rows=request.param)
    return StoredRows(tmp_path / "rows.arrow")


def test_rows_come_back(stored: StoredRows) -> None:
    assert list(stored) == ROWS
    assert [stored[number] for number in range(len(stored))] == ROWS
    assert (stored[-1], list(stored[3:9:2])) == (ROWS[-1], ROWS[3:9:2])
    chosen = stored.chosen(np.array([4, 40, 4]))
    assert list(chosen) == [ROWS[4], ROWS[40], ROWS[4]]


@pytest.mark.parametrize("numbers", [list(range(50)), [0, 1, 2], [49, 3, 3, 8], []])
def test_columns_say_what_the_rows_say(numbers: list[int], stored: StoredRows) -> None:
    chosen = stored.chosen(np.array(numbers, np.int64))
    rows = [ROWS[number] for number in numbers]
    pairs = [pair for row in rows for pair in row.pairs]
    assert chosen.lengths(0, 1).tolist() == [len(pair) for pair in pairs]
    assert chosen.lengths(0).tolist() == [len(pair.prompt_ids) for pair in pairs]
    assert chosen.lengths(1).tolist() == [len(pair.answer_ids) for pair in pairs]
    assert chosen.total("num_template_tokens") == sum(pair.num_template_tokens for pair in pairs)
    assert chosen.longest_pairs().tolist() == [max(map(len, row.pairs)) for row in rows]
    assert chosen.of_rows("source").tolist() == [number % 2 for number in numbers]
    assert chosen.of_rows("has_system").astype(bool).tolist() == [number % 5 == 0 for number in numbers]


def test_hashes_tell_rows_apart(tmp_path: Path) -> None:
    """By their first prompt, by all of their tokens and by where prompt and answer meet, by their last answer."""
    pairs = [Pair((1, 2), (3,)), Pair((1, 2), (4,)), Pair((1,), (2, 3)), Pair((5, 2), (3,)), Pair((1, 2), (3,))]
    prompt = ({"role": "user", "content": "q"},)
    rows = [Row(number, "x:1", (pair,), prompt) for number, pair in enumerate(pairs)]
    _write(tmp_path / "rows.arrow", rows, [RowFacts()] * len(rows))
    stored = StoredRows(tmp_path / "rows.arrow")
    kinds = {name: stored.of_rows(name).tolist() for name in ("prompt_hash", "row_hash", "answer_hash")}
    same = {name: [values.index(value) for value in values] for name, values in kinds.items()}
    assert same == {"prompt_hash": [0, 0, 2, 3, 0], "row_hash": [0, 1, 2, 3, 0], "answer_hash": [0, 1, 2, 0, 0]}


def _digest(rows: StoredRows) -> str:
    digest = hashlib.sha256()
    rows.update_hash(digest)
    return digest.hexdigest()


def test_written_again(stored: StoredRows, tmp_path: Path) -> None:
    chosen = stored.chosen(np.array([7, 3, 20]))
    chosen.write(tmp_path / "chosen.arrow")
    again = StoredRows(tmp_path / "chosen.arrow")
    assert list(again) == list(chosen) == [ROWS[7], ROWS[3], ROWS[20]]
    with pa.memory_map(str(tmp_path / "chosen.arrow")) as source:
        assert pa.ipc.open_file(source).schema == SCHEMA


def test_hash_follows_rows_and_their_order(stored: StoredRows) -> None:
    orders = [[0, 1, 2], [0, 2, 1], [0, 1], [], list(range(50))]
    digests = [_digest(stored.chosen(np.array(order, np.int64))) for order in orders]
    assert len(set(digests)) == len(orders)
    assert digests == [_digest(stored.chosen(np.array(order, np.int64))) for order in orders]


def test_no_rows(tmp_path: Path) -> None:
    with RowWriter(tmp_path / "rows.arrow"):
        pass
    stored = StoredRows(tmp_path / "rows.arrow")
    assert (len(stored), list(stored), stored.lengths(0, 1).tolist()) == (0, [], [])
    stored.write(tmp_path / "again.arrow")
    assert list(StoredRows(tmp_path / "again.arrow")) == []


def test_no_memory_for_a_thread_is_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow says "Unknown error"; another fault of a file stays what it is."""
    problem = "Unknown error: Failed to launch worker thread: Resource temporarily unavailable"

    def refuse(*_: Any) -> Any:
        raise pa.ArrowException(problem)

    with RowWriter(tmp_path / "rows.arrow"):
        pass
    monkeypatch.setattr(pa.ipc, "open_file", refuse)
    with pytest.raises(MemoryError):
        StoredRows(tmp_path / "rows.arrow")
    problem = "Unknown error: something else"
    with pytest.raises(pa.ArrowException):
        StoredRows(tmp_path / "rows.arrow")
