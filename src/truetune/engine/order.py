"""The order of the data: a function of seed and epoch alone. Numpy only: nothing here loads torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np


def epoch_batches(num_rows: int, batch_size: int, *, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the row numbers of each step of one epoch; the last, smaller batch is kept."""
    order = np.random.default_rng([seed, 0, epoch]).permutation(num_rows)
    return [order[start : start + batch_size] for start in range(0, num_rows, batch_size)]


def batches(num_rows: int, batch_size: int, *, seed: int, start: int = 0) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (epochs done after the step, row numbers) of each step for ever, from step `start` on."""
    epoch, skip = divmod(start, math.ceil(num_rows / batch_size))
    while True:
        for number, rows in enumerate(epoch_batches(num_rows, batch_size, seed=seed, epoch=epoch)):
            if number >= skip:
                yield epoch + min((number + 1) * batch_size, num_rows) / num_rows, rows
        epoch, skip = epoch + 1, 0
