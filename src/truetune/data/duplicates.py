"""Which rows are the same to the last token id: groups of them, and where each of their rows stands.

row          0  1  2  3  4  5
row_hash     9  4  9  7  4  9      sorted, equal ones in the order of the rows:   4 4 | 7 | 9 9 9
                                                                            row   1 4 | 3 | 0 2 5
groups       0: 2, 5;  1: 4        in the order of their first rows; what stands alone is none
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from truetune.data.store import StoredRows

MAX_OTHERS = 100
"""Places that are listed of a group beside its first row's; `count` says how many there are."""
BLOCK_ROWS = 1 << 16
"""Rows whose places are read together: what is held in memory of a million."""


@dataclass(frozen=True, slots=True)
class Group:
    """A row, and those that repeat it: `row`, `where` of the first, `count` of the others, `others`: their places."""

    row: int
    where: str
    count: int
    others: tuple[str, ...]


class Duplicates:
    """The groups of all rows to train on and held out; `num_repeats`: rows that repeat an earlier one."""

    def __init__(self, train: StoredRows, held_out: StoredRows) -> None:
        numbers = np.sort(np.concatenate([train.numbers, held_out.numbers]))
        self._rows = train.chosen(numbers)
        hashes = self._rows.of_rows("row_hash")
        order = np.argsort(hashes, kind="stable")
        starts = np.flatnonzero(np.diff(hashes[order], prepend=~hashes[order[:1]]))
        sizes = np.diff(np.append(starts, len(order)))
        repeated = np.flatnonzero(sizes > 1)
        repeated = repeated[np.argsort(order[starts[repeated]])]
        self._order, self._starts, self._sizes = order, starts[repeated], sizes[repeated]
        self.num_repeats = len(order) - len(starts)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Group]:
        listed = np.minimum(self._sizes, 1 + MAX_OTHERS)
        blocks = np.flatnonzero(np.diff(np.cumsum(listed) // BLOCK_ROWS, prepend=-1))
        for first, last in itertools.pairwise([*blocks, len(self)]):
            yield from self._block(slice(int(first), int(last)), listed[first:last])

    def _block(self, groups: slice, listed: np.ndarray) -> Iterator[Group]:
        """Yield some groups; listed [G]: how many rows of each are named."""
        at = np.concatenate([np.arange(listed[n]) + start for n, start in enumerate(self._starts[groups])])
        rows = self._rows.chosen(self._rows.numbers[self._order[at]])
        places, numbers = rows.places(), rows.of_rows("row")
        stop = 0
        for size, many in zip(self._sizes[groups].tolist(), listed.tolist(), strict=True):
            start, stop = stop, stop + many
            yield Group(int(numbers[start]), places[start], size - 1, tuple(places[start + 1 : stop]))
