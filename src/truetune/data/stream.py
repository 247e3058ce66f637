"""Files as one endless stream of rows, cut into blocks; each block can be read again, alone, from its place.

epoch 0      file 2      file 0      file 1       in an order of (seed, epoch)
rows         ─────────── ─────────── ──────
blocks       ───────┬───────┬───────┬──────       of `size` rows; the last one of an epoch is smaller
places       ^      ^       ^       ^             epoch, file, mark in it, number of the first row
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from truetune.data.batches import OneShape
from truetune.data.mark import Cursor, Mark
from truetune.data.sources import Source, read_rows, state_of
from truetune.errors import RowError, UserError
from truetune.records import RawRow

START_BYTES = 1 << 16
"""Of each file, hashed to tell it from another one; with its size and time of change."""


@dataclass(frozen=True)
class Place:
    """Where a block begins. `file`: in the order of the epoch. `row`: rows of the run before it. `shape`: see OneShape.

    `block`: its number in the epoch.
    """

    epoch: int = 0
    file: int = 0
    row: int = 0
    block: int = 0
    mark: Mark = field(default_factory=Mark)
    shape: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Place:
        """Return the place that `to_dict` wrote."""
        return cls(**values | {"mark": Mark(**values["mark"])})


@dataclass(frozen=True)
class RawBlock:
    """Rows as they were read, each with the place, among the names given, of its file. `following`: the next place."""

    place: Place
    following: Place
    raws: list[tuple[int, RawRow | RowError]]


@dataclass(frozen=True)
class Stream:
    """Files to read again and again. `states`: size and time of change of each when the run began to look.

    `fingerprint`: tells them from others, wherever they lie: names, states and beginnings.
    """

    files: Sequence[Source]
    encoding: str
    seed: int
    block_rows: int
    states: Sequence[tuple[int, int]]
    fingerprint: str

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.states)

    def progress(self, place: Place) -> float:
        """Return the epochs read before a place: a part of one by bytes, or by whole files where rows are counted."""
        order = file_order(len(self.files), seed=self.seed, epoch=place.epoch)
        num_read = sum(self.states[number][0] for number in order[: place.file]) + place.mark.byte
        return place.epoch + num_read / max(self.num_bytes, 1)

    def blocks(self, start: Place = Place()) -> Iterator[RawBlock]:
        """Yield the blocks from a place on, for ever.

        Raises: UserError if a file cannot be read, has changed, or none holds a row.
        """
        place = start
        while True:
            first = place
            for block in self._epoch(place):
                yield block
                place = block.following
            if place == first and first == Place(first.epoch):
                raise UserError("no_rows", where="data", fix="no_rows")
            place = Place(first.epoch + 1, row=place.row)

    def _epoch(self, start: Place) -> Iterator[RawBlock]:
        """Yield the blocks from a place to the end of its epoch."""
        order = file_order(len(self.files), seed=self.seed, epoch=start.epoch)
        place, raws = start, list[tuple[int, RawRow | RowError]]()
        for at in range(start.file, len(order)):
            file = self.files[order[at]]
            if state_of(file.path) != self.states[order[at]]:
                raise UserError("data_changed", where=str(file.path), fix="data_changed")
            is_first = at == start.file
            cursor, shape = Cursor(start.mark if is_first else None), OneShape(start.shape if is_first else None)
            for raw in read_rows(file, encoding=self.encoding, cursor=cursor):
                raws.append((file.entry, shape.checked(raw)))
                if len(raws) == self.block_rows:
                    following = Place(
                        start.epoch, at, place.row + len(raws), place.block + 1, cursor.mark(), shape.first
                    )
                    yield RawBlock(place, following, raws)
                    place, raws = following, []
        if raws:
            yield RawBlock(place, Place(start.epoch + 1, row=place.row + len(raws)), raws)


def open_stream(files: Sequence[Source], *, encoding: str, seed: int, block_rows: int) -> Stream:
    """Return the stream of files as they are now.

    Raises: UserError if one cannot be opened.
    """
    states = [state_of(file.path) for file in files]
    digest = hashlib.sha256(repr((encoding, block_rows)).encode())
    for file, state in zip(files, states, strict=True):
        digest.update(repr((file.path.name, state, file.names)).encode())
        with file.path.open("rb") as content:
            digest.update(content.read(START_BYTES))
    return Stream(files, encoding, seed, block_rows, states, digest.hexdigest())


def file_order(num_files: int, *, seed: int, epoch: int) -> list[int]:
    """Return the order of the files in an epoch; of the first one, as they were given.

    >>> file_order(3, seed=1, epoch=0)
    [0, 1, 2]
    """
    if epoch == 0:
        return list(range(num_files))
    return [int(number) for number in np.random.default_rng([seed, 3, epoch]).permutation(num_files)]
