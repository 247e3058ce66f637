"""Keys and values of many conversations in one buffer a layer, each conversation in a row of its own.

    row 0   p p p p a a a . . .      length 7; tokens stand at their positions, from the left
    row 1   p p a . . . . . . .      length 3; what is behind is never seen: a query at position i sees keys 0..i
    row 2   p p p p p p p a . .

A forward writes Q tokens of some rows at each row's own place, so that a step of answers (Q = 1) and a piece of new
prompts are one and the same thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

FULL, SLIDING = "full_attention", "sliding_attention"


class SlotCache(Cache):  # type: ignore[misc]
    """Room for `num_rows` rows of `length` tokens; made small at first, grown by `resize`."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[_Layer() for _ in range(num_layers)])
        self.num_rows = self.length = 0

    def resize(self, num_rows: int, *, length: int, num_kept: int) -> None:
        """Give the buffers another size; the first `num_kept` rows keep what they hold, as far as it fits."""
        self.num_rows, self.length = num_rows, length
        for layer in self.layers:
            layer.resize(num_rows, length, num_kept)

    def copy_row(self, source: int, target: int, *, length: int) -> None:
        """Copy the first `length` tokens of a row to another row."""
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                buffer[target, :, :length] = buffer[source, :, :length]

    def aim(self, rows: Sequence[int], positions_BQ: torch.Tensor, *, width: int) -> None:
        """Say which rows the next forward is for, where its tokens go, and how many keys it reads (`width`)."""
        is_first_rows = list(rows) == list(range(len(rows)))
        # The first rows are a view; others are copied.
        index: Any = slice(0, len(rows)) if is_first_rows else torch.tensor(rows, device=positions_BQ.device)
        rows_B1 = torch.tensor(rows, device=positions_BQ.device)[:, None]
        for layer in self.layers:
            layer.index, layer.rows_B1, layer.positions_BQ, layer.width = index, rows_B1, positions_BQ, width


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """Buffers [rows, G, T, D] of one layer, made at the first update, when their shape is known."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.size = (0, 0)
        self.index: Any = slice(0, 0)
        self.rows_B1 = self.positions_BQ = torch.empty(0)
        self.width = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        num_rows, length = self.size
        self.keys = key_states.new_zeros(num_rows, key_states.shape[1], length, key_states.shape[3])
        self.values = value_states.new_zeros(num_rows, value_states.shape[1], length, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # Indices around a slice: the result is [B, Q, G, D].
        self.keys[self.rows_B1, :, self.positions_BQ] = key_states.transpose(1, 2)
        self.values[self.rows_B1, :, self.positions_BQ] = value_states.transpose(1, 2)
        return self.keys[self.index, :, : self.width], self.values[self.index, :, : self.width]

    def resize(self, num_rows: int, length: int, num_kept: int) -> None:
        self.size = (num_rows, length)
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(num_rows, old.shape[1], length, old.shape[3])
            shared = min(length, old.shape[2])
            new[:num_kept, :, :shared] = old[:num_kept, :, :shared]
            setattr(self, name, new)

    def get_seq_length(self) -> int:
        return self.width

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, _query_length: int) -> tuple[int, int]:
        return self.width, 0


def attention_masks(config: Any, positions_BQ: torch.Tensor, *, width: int, dtype: torch.dtype) -> Any:
    """Return the mask [B, 1, Q, T] that shows a query at position i the keys 0..i, or one for each kind of layer.

    A sliding layer shows the last `sliding_window` of them.
    """
    keys_T = torch.arange(width, device=positions_BQ.device)
    distance_B1QT = (positions_BQ[:, :, None] - keys_T)[:, None]
    is_seen = distance_B1QT >= 0
    masks = {FULL: is_seen}
    kinds = layer_kinds(config)
    if SLIDING in kinds:
        masks[SLIDING] = is_seen & (distance_B1QT < config.sliding_window)
    if config._attn_implementation == "eager":
        # It adds the mask.
        lowest = torch.finfo(dtype).min
        masks = {kind: torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest) for kind, mask in masks.items()}
    return masks[kinds.pop()] if len(kinds) == 1 else masks


def layer_kinds(config: Any) -> set[str]:
    """Return the kinds of attention that a model's layers have, as transformers names them."""
    named = getattr(config, "layer_types", None)
    if named:
        return set(named)
    # Mistral's first version: every layer slides, and its mask is one tensor.
    return {SLIDING if getattr(config, "sliding_window", None) else FULL}
