"""Rows for the loop out of a stream: prepared block by block ahead of their use, shuffled in each, in full steps.

    stream ── block ── block ── block            read and prepared by a thread and its helpers, one block ahead
    shuffled    ▒▒▒▒▒    ▒▒▒▒▒                     by (seed, epoch, block)
    steps      ──┬──┬───┬──┬──                    of `batch_size` rows; one may take the rest of a block and go on
    positions    ^  ^   ^  ^                      in the next: (place of the block, rows of it that are used)

A position leads back to the same rows, whatever was read before it. So a checkpoint holds one and nothing else.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from truetune.data.batches import BATCH_ROWS, Done, Job, Preparer, numbered
from truetune.data.crew import Crew
from truetune.data.store import StoredRows
from truetune.data.stream import Place, RawBlock, Stream
from truetune.errors import RowError, UserError, UserErrors
from truetune.records import Row

MAX_SHOWN = 10
"""Refused rows that are shown when they stop a run."""

NUM_POSITIONS = 16
"""Positions that are remembered: of the step that was taken last, and of those that are built ahead of it."""

NUM_FIRST = 500
"""Rows that are kept to be looked at again when the run has ended."""


@dataclass(frozen=True)
class Block:
    """A block prepared: its rows in the order of their use, those refused, those that a held-out prompt keeps out."""

    place: Place
    following: Place
    rows: StoredRows
    refused: list[RowError]
    apart: list[RowError]


@dataclass
class Feed:
    """The rows of a streamed run, step by step. A step's `epoch` is that of its last row, see Stream.progress.

    `kept_apart`: hashes of the held-out rows' prompts; rows with one of them are not trained. `held_out`: where the
    held-out rows themselves stand. `num_ids`: ids that the model has an embedding for. `on_left_out`: told, with the
    step that a block is first used in, which of its rows are not trained and why.
    """

    stream: Stream
    preparer: Preparer
    kept_apart: frozenset[int] = frozenset()
    held_out: frozenset[str] = frozenset()
    num_ids: int | None = None
    on_left_out: Callable[[int, list[RowError]], None] = lambda _step, _rows: None
    _start: tuple[Place, int] = (Place(), 0)
    _positions: dict[int, tuple[Place, int]] = field(default_factory=dict)
    _first: list[Row] = field(default_factory=list)

    def position_at(self, step: int) -> dict[str, Any]:
        """Return where the rows of the step after `step` begin, as plain values; one of the last few steps."""
        place, used = self._positions.get(step, self._start)
        return {"files": self.stream.fingerprint, "place": place.to_dict(), "used": used}

    def go_to(self, position: dict[str, Any]) -> None:
        """Let `steps` begin at a position.

        Raises: UserError if it is one in other files: their bytes need not mean what they meant.
        """
        if position["files"] != self.stream.fingerprint:
            raise UserError("stream_changed", where="data", fix="stream_changed")
        self._start = Place.from_dict(position["place"]), int(position["used"])

    def steps(self, start: int, *, batch_size: int) -> Generator[tuple[float, list[Row]], None, None]:
        """Yield (epochs read, rows) of each step after `start`, for ever.

        Raises: UserError if a row is refused and may not be skipped, or a file cannot be read.
        """
        place, used = self._start
        step, rows, last_epoch = start, list[Row](), place.epoch
        is_over = threading.Event()
        with closing(_ahead(self._blocks(place, is_over), is_over)) as blocks:
            for block in blocks:
                if used == 0:
                    self._require_usable(block, step + 1)
                if len(block.rows):
                    last_epoch = block.place.epoch
                elif block.place.epoch > last_epoch + 1:
                    raise UserError("no_rows", where="data", fix="no_rows")
                while used < len(block.rows):
                    some = block.rows[used : used + batch_size - len(rows)]
                    rows += some
                    used += len(some)
                    if len(rows) == batch_size:
                        step += 1
                        is_used_up = used == len(block.rows)
                        self._remember(step, (block.following, 0) if is_used_up else (block.place, used), rows)
                        yield self._epoch(block, used), rows
                        rows = []
                used = 0

    def first(self, num_trained: int, *, batch_size: int) -> list[Row]:
        """Return the rows that were trained first, of so many; read again, in a run that went on."""
        count = min(num_trained, NUM_FIRST)
        if len(self._first) >= count:
            return self._first[:count]
        again = Feed(self.stream, self.preparer, self.kept_apart, self.held_out, self.num_ids)
        with closing(again.steps(0, batch_size=batch_size)) as steps:
            return [row for _, rows in islice(steps, -(-count // batch_size)) for row in rows][:count]

    def _remember(self, step: int, position: tuple[Place, int], rows: list[Row]) -> None:
        self._positions[step] = position
        self._positions.pop(step - NUM_POSITIONS, None)
        if len(self._first) < NUM_FIRST and step == 1 + len(self._first) // max(len(rows), 1):
            self._first += rows

    def _epoch(self, block: Block, used: int) -> float:
        begin, end = (self.stream.progress(place) for place in (block.place, block.following))
        return begin + (end - begin) * used / len(block.rows)

    def _require_usable(self, block: Block, step: int) -> None:
        """Tell what is left out of a block before its first row is used.

        Raises: UserErrors if that may not be; UserError if the tokenizer knows more than the model.
        """
        highest = block.rows.highest_id()
        if self.num_ids is not None and highest >= self.num_ids:
            values = {"id": highest, "rows": self.num_ids}
            raise UserError("tokenizer_too_large", where="data", fix="tokenizer_too_large", **values)
        if block.refused or block.apart:
            self.on_left_out(step, [*block.refused, *block.apart])
        if block.refused and self.preparer.config.invalid != "skip":
            count = len(block.refused)
            last = UserError("stream_refused", where=f"step {step}", fix="stream_refused", count=count)
            raise UserErrors([*block.refused[:MAX_SHOWN], last])

    def _blocks(self, start: Place, is_over: threading.Event) -> Generator[Block, None, None]:
        """Yield the blocks from a place on, prepared, until `is_over`; helpers work ahead across their borders."""
        underway: deque[RawBlock] = deque()

        def jobs() -> Iterator[Job]:
            for block in self.stream.blocks(start):
                underway.append(block)
                for at in range(0, len(block.raws), BATCH_ROWS):
                    if is_over.is_set():
                        return
                    yield Job(block.place.row + at, block.raws[at : at + BATCH_ROWS])

        with Crew(self.preparer, num_bytes=self.stream.num_bytes) as crew, closing(crew.prepare(jobs())) as done:
            for first in done:
                block = underway.popleft()
                yield self._block(block, [first, *islice(done, -(-len(block.raws) // BATCH_ROWS) - 1)])

    def _block(self, raw: RawBlock, done: list[Done]) -> Block:
        is_compared = self.preparer.config.loss != "sft"
        rows = StoredRows.of_batches(numbered(done), is_compared=is_compared)
        is_apart = np.isin(rows.of_rows("prompt_hash"), np.array(sorted(self.kept_apart), np.uint64))
        numbers = rows.numbers[~is_apart]
        places = (rows[int(at)].where for at in np.flatnonzero(is_apart))
        apart = [RowError("row_apart", where=at, fix="row_apart") for at in places if at not in self.held_out]
        generator = np.random.default_rng([self.stream.seed, 2, raw.place.epoch, raw.place.block])
        refused = [row for one in done for row in one.tally.refused]
        shuffled = rows.chosen(generator.permutation(numbers))
        return Block(raw.place, raw.following, shuffled, refused, apart)


def _ahead(blocks: Generator[Block, None, None], is_over: threading.Event) -> Generator[Block, None, None]:
    """Yield the blocks; while one is used, a thread prepares the next one. Closed, it ends that, too."""
    with closing(blocks), ThreadPoolExecutor(max_workers=1) as reader:
        try:
            following = reader.submit(next, blocks)
            while True:
                block = following.result()
                following = reader.submit(next, blocks)
                yield block
        finally:
            is_over.set()
