"""Files as one endless stream: every row once an epoch, and the same blocks again from any place."""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest

from truetune.data.sources import Source
from truetune.data.stream import Place, RawBlock, Stream, file_order, open_stream
from truetune.errors import RowError, UserError
from truetune.records import RawRow

SIZES = (7, 3, 11)


@pytest.fixture
def files(tmp_path: Path) -> list[Source]:
    """Three files of 21 rows together."""
    found = []
    for number, size in enumerate(SIZES):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{number} {row}"}) + "\n" for row in range(size)))
        found.append(Source(path, entry=number))
    return found


def stream_of(files: list[Source], *, block_rows: int = 5, seed: int = 1) -> Stream:
    """Their stream."""
    return open_stream(files, encoding="utf-8", seed=seed, block_rows=block_rows)


def texts(block: RawBlock) -> list[str]:
    """The texts of a block."""
    return [raw.value["text"] for _, raw in block.raws if isinstance(raw, RawRow)]


def test_every_row_comes_once_an_epoch(files: list[Source]) -> None:
    for block_rows in (1, 4, 5, 7, 21, 50):
        per_epoch = -(-21 // block_rows)
        blocks = list(islice(stream_of(files, block_rows=block_rows).blocks(), 3 * per_epoch))
        for epoch in range(3):
            some = blocks[epoch * per_epoch : (epoch + 1) * per_epoch]
            assert [block.place.epoch for block in some] == [epoch] * per_epoch
            assert [block.place.block for block in some] == list(range(per_epoch))
            assert Counter(text for block in some for text in texts(block)) == Counter(
                f"{number} {row}" for number, size in enumerate(SIZES) for row in range(size)
            )
            assert {len(block.raws) for block in some[:-1]} <= {block_rows}
        assert [block.place.row for block in blocks] == [
            sum(len(block.raws) for block in blocks[:at]) for at in range(len(blocks))
        ]
        assert all(a.following.row == b.place.row for a, b in pairwise(blocks))


def test_files_change_places_from_the_second_epoch_on(files: list[Source]) -> None:
    assert file_order(9, seed=5, epoch=0) == list(range(9))
    orders = [tuple(file_order(9, seed=5, epoch=epoch)) for epoch in range(1, 30)]
    assert len(set(orders)) > 25
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(9))}
    assert file_order(9, seed=6, epoch=1) != file_order(9, seed=5, epoch=1)
    entries = [[entry for entry, _ in block.raws] for block in islice(stream_of(files, block_rows=21).blocks(), 5)]
    assert entries[0] == [0] * 7 + [1] * 3 + [2] * 11
    assert len({tuple(some) for some in entries}) > 1


@pytest.mark.parametrize("block_rows", [1, 5, 7, 21, 50])
def test_from_any_place_the_same_blocks_follow(block_rows: int, files: list[Source]) -> None:
    whole = list(islice(stream_of(files, block_rows=block_rows).blocks(), 50))
    for at, block in enumerate(whole[:45]):
        for place in (block.place, whole[at - 1].following if at else block.place):
            place = Place.from_dict(json.loads(json.dumps(place.to_dict())))
            again = list(islice(stream_of(files, block_rows=block_rows).blocks(place), 4))
            assert [texts(one) for one in again] == [texts(one) for one in whole[at : at + 4]]
            assert [one.following for one in again] == [one.following for one in whole[at : at + 4]]


def test_progress_is_the_share_of_the_bytes(files: list[Source]) -> None:
    stream = stream_of(files, block_rows=3)
    blocks = list(islice(stream.blocks(), 15))
    read = [stream.progress(block.following) for block in blocks]
    assert read == sorted(read)
    assert read[6] == pytest.approx(1.0, abs=0.01)
    assert read[13] == pytest.approx(2.0, abs=0.01)
    assert read[2] == pytest.approx(9 / 21, abs=0.03)


def test_a_file_of_two_shapes_is_refused_in_any_block(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "a"}, {"text": "b"}, {"prompt": "c", "completion": "d"}, {"text": "e"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for block_rows in (1, 2, 4):
        blocks = list(islice(stream_of([Source(path)], block_rows=block_rows).blocks(), -(-4 // block_rows)))
        raws = [raw for block in blocks for _, raw in block.raws]
        assert [isinstance(raw, RowError) for raw in raws] == [False, False, True, False]
        last = next(stream_of([Source(path)], block_rows=block_rows).blocks(blocks[-1].place))
        assert [type(raw) for _, raw in last.raws] == [type(raw) for _, raw in blocks[-1].raws]


@pytest.mark.parametrize("change", ["longer", "touched"])
def test_a_file_that_changes_ends_the_stream(change: str, files: list[Source]) -> None:
    blocks = stream_of(files, block_rows=5).blocks()
    next(blocks)
    path = files[2].path
    if change == "longer":
        path.write_text(path.read_text() + '{"text": "new"}\n')
    else:
        os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="changed"):
        list(islice(blocks, 9))


def test_the_fingerprint_tells_files_apart_and_not_their_folder(files: list[Source], tmp_path: Path) -> None:
    first = stream_of(files).fingerprint
    assert stream_of(files, seed=9).fingerprint == first
    assert stream_of(files[:2]).fingerprint != first
    moved = tmp_path / "moved"
    moved.mkdir()
    names: list[Any] = []
    for file in files:
        state = file.path.stat()
        target = moved / file.path.name
        target.write_bytes(file.path.read_bytes())
        os.utime(target, ns=(state.st_atime_ns, state.st_mtime_ns))
        names.append(Source(target, entry=file.entry))
    assert stream_of(names).fingerprint == first
    state = names[0].path.stat()
    content = names[0].path.read_bytes()
    names[0].path.write_bytes(content.replace(b"0 0", b"0 9"))
    os.utime(names[0].path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert stream_of(names).fingerprint != first


def test_files_without_a_row_are_no_endless_loop(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n")
    with pytest.raises(UserError, match="no row"):
        next(stream_of([Source(path)]).blocks())
