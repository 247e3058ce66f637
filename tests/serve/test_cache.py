"""Buffers of keys and values, and who sees which of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from truetune.serve.cache import FULL, SLIDING, SlotCache, attention_masks, layer_kinds


def filled() -> SlotCache:
    """Two layers of 3 rows; row r holds 4 tokens of value 10 r + position."""
    cache = SlotCache(2)
    cache.resize(3, length=6, num_kept=0)
    positions = torch.arange(4).expand(3, 4)
    cache.aim(range(3), positions, width=4)
    values = (10 * torch.arange(3)[:, None] + positions)[:, None, :, None].expand(3, 2, 4, 5).float()
    for layer in range(2):
        keys, seen = cache.update(values, -values, layer)
        assert torch.equal(keys, values)
        assert torch.equal(seen, -values)
    return cache


def row(cache: SlotCache, number: int) -> list[float]:
    return cache.layers[1].keys[number, 0, :, 0].tolist()


def test_rows_are_written_at_their_own_places() -> None:
    cache = filled()
    cache.aim([2, 0], torch.tensor([[4], [1]]), width=5)
    keys, _ = cache.update(torch.full((2, 2, 1, 5), 99.0), torch.zeros(2, 2, 1, 5), 1)
    assert keys[:, 0, :, 0].tolist() == [[20, 21, 22, 23, 99], [0, 99, 2, 3, 0]]
    assert row(cache, 1)[:4] == [10, 11, 12, 13]


def test_rows_survive_copies_and_sizes() -> None:
    cache = filled()
    cache.copy_row(2, 0, length=3)
    assert row(cache, 0)[:4] == [20, 21, 22, 3]
    cache.resize(4, length=8, num_kept=3)
    assert row(cache, 2) == [20, 21, 22, 23, 0, 0, 0, 0]
    cache.resize(1, length=2, num_kept=1)
    assert row(cache, 0) == [20, 21]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_query_sees_what_is_not_behind_it(implementation: str) -> None:
    config = SimpleNamespace(layer_types=[FULL, SLIDING], sliding_window=2, _attn_implementation=implementation)
    positions = torch.tensor([[0, 1], [3, 4]])
    masks: dict[str, Any] = attention_masks(config, positions, width=5, dtype=torch.float32)
    seen = {
        kind: (mask if mask.dtype == torch.bool else mask == 0)[:, 0].int().tolist() for kind, mask in masks.items()
    }
    assert seen[FULL] == [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]
    assert seen[SLIDING] == [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]]


def test_kinds_of_layers() -> None:
    assert layer_kinds(SimpleNamespace(layer_types=[FULL, "linear_attention"])) == {FULL, "linear_attention"}
    assert layer_kinds(SimpleNamespace(sliding_window=4)) == {SLIDING}
    assert layer_kinds(SimpleNamespace(sliding_window=None)) == {FULL}
