"""The order of the data: a function of seed and epoch alone. Numpy only: nothing here loads torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mix:
    """Rows of several sources. `source_R`: each row's; `weights`: how often a source's rows come in an epoch.

    Weight 2.25: every row twice, and another quarter of them, drawn anew for each epoch.
    """

    source_R: np.ndarray
    weights: tuple[float, ...]

    def __len__(self) -> int:
        """Return the rows of an epoch, repeats counted."""
        return sum(sum(parts) for parts in self._counts())

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """Return the row numbers of one epoch, source by source."""
        drawn = []
        for source, (num_whole, num_rest) in enumerate(self._counts()):
            rows = np.flatnonzero(self.source_R == source)
            drawn += [np.tile(rows, num_whole // max(len(rows), 1)), generator.permutation(rows)[:num_rest]]
        return np.concatenate(drawn)

    def _counts(self) -> Iterator[tuple[int, int]]:
        """Yield for each source how many rows come from whole repeats, and from the rest of its weight."""
        for source, weight in enumerate(self.weights):
            num_rows = int((self.source_R == source).sum())
            yield int(weight) * num_rows, round((weight - int(weight)) * num_rows)


def epoch_batches(num_rows: int, batch_size: int, *, seed: int, epoch: int, mix: Mix | None = None) -> list[np.ndarray]:
    """Return the row numbers of each step of one epoch; the last, smaller batch is kept. `mix`: else each row once."""
    generator = np.random.default_rng([seed, 0, epoch])
    order = generator.permutation(num_rows if mix is None else mix.draw(generator))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def batches(
    num_rows: int, batch_size: int, *, seed: int, start: int = 0, mix: Mix | None = None
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (epochs done after the step, row numbers) of each step for ever, from step `start` on."""
    total = num_rows if mix is None else len(mix)
    epoch, skip = divmod(start, -(-total // batch_size))
    while True:
        for number, rows in enumerate(epoch_batches(num_rows, batch_size, seed=seed, epoch=epoch, mix=mix)):
            if number >= skip:
                yield epoch + min((number + 1) * batch_size, total) / total, rows
        epoch, skip = epoch + 1, 0
