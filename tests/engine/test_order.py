"""The order of the data: every row once an epoch, the same from any step on."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from truetune.engine.order import batches, epoch_batches


@pytest.mark.parametrize(("num_rows", "batch_size"), [(10, 4), (8, 4), (3, 4), (1, 1), (10, 3)])
def test_each_row_once_an_epoch(num_rows: int, batch_size: int) -> None:
    """An epoch holds every row once, its last batch is what is left, and epochs differ in order."""
    per_epoch = math.ceil(num_rows / batch_size)
    taken = list(itertools.islice(batches(num_rows, batch_size, seed=3), 2 * per_epoch))
    epochs = [np.concatenate([rows for _, rows in taken[at : at + per_epoch]]) for at in (0, per_epoch)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(num_rows))] * 2
    assert len(taken[per_epoch - 1][1]) == (num_rows - 1) % batch_size + 1
    assert taken[per_epoch - 1][0] == 1.0
    assert num_rows < 8 or list(epochs[0]) != list(epochs[1])
    assert list(np.concatenate(epoch_batches(num_rows, batch_size, seed=3, epoch=1))) == list(epochs[1])


def test_order_is_a_function_of_seed_and_step() -> None:
    """Started at any step, the order goes on as if it had never stopped; another seed gives another order."""
    whole = [list(rows) for _, rows in itertools.islice(batches(10, 4, seed=3), 9)]
    for start in range(9):
        rest = [list(rows) for _, rows in itertools.islice(batches(10, 4, seed=3, start=start), 9 - start)]
        assert rest == whole[start:]
    assert whole != [list(rows) for _, rows in itertools.islice(batches(10, 4, seed=4), 9)]
