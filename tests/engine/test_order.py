"""The order of the data: every row once an epoch, the same from any step on."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from truetune.engine.order import Mix, batches, epoch_batches


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


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.5), (0.25, 3.0), (1.5, 0.1)])
def test_weights_say_how_often_rows_come(weights: tuple[float, float]) -> None:
    """In every epoch each source has its share, whole repeats hold every row, and the rest differs between epochs."""
    source_R = np.array([0] * 40 + [1] * 20)
    mix = Mix(source_R, weights)
    epochs = [np.concatenate(epoch_batches(60, 7, seed=3, epoch=epoch, mix=mix)) for epoch in range(3)]
    for rows in epochs:
        counts = np.bincount(rows, minlength=60)
        assert len(rows) == len(mix) == round(weights[0] * 40) + round(weights[1] * 20)
        for source, weight in enumerate(weights):
            assert counts[source_R == source].sum() == round(weight * (source_R == source).sum())
            assert set(counts[source_R == source]) <= {int(weight), int(weight) + 1}
    assert not np.array_equal(epochs[0], epochs[1])
    if any(weight % 1 for weight in weights):
        assert set(epochs[0].tolist()) != set(epochs[1].tolist()) or sorted(epochs[0]) != sorted(epochs[1])
    steps = list(itertools.islice(batches(60, 7, seed=3, mix=mix), 3 * math.ceil(len(mix) / 7)))
    assert np.array_equal(np.concatenate([rows for _, rows in steps]), np.concatenate(epochs))
    assert steps[-1][0] == 3.0


def test_weights_of_one_change_only_the_draw() -> None:
    mix = Mix(np.zeros(10, int), (1.0,))
    assert sorted(np.concatenate(epoch_batches(10, 4, seed=3, epoch=0, mix=mix))) == list(range(10))
