"""Rows that are answered together: one forward for all of them, newcomers between the steps.

Every row is a list of ids of which the first `num_done` are in the cache. A step feeds each row its next id, and a row
that has no further id then gets one from the logits. A newcomer's prompt is fed in wider pieces first:

    ids      p p p p p p p            num_done 0
    piece    [p p p p]                num_done 4      one forward, its logits are not used
    step              [p]             num_done 5      with all other rows
    ...
    step                  [p] → a     num_done 7      the last id of the prompt gives the first token of the answer

Ids that a row of the cache holds already (a system prompt, the turns before) are copied, not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from truetune.records import first_difference
from truetune.serve.cache import SlotCache, attention_masks
from truetune.serve.sampler import Draw, Scored, pick, score

LENGTH_STEP, WIDTH_STEP = 256, 16
"""Buffers grow by so many tokens, so that they seldom grow; pieces are so wide or a multiple: for each new shape a CPU
compiles its products anew, and keeps them."""


@dataclass(eq=False)
class Row:
    """A prompt and its answer so far. `num_reserved`: ids that it can come to have."""

    ids: list[int]
    draw: Draw
    num_reserved: int
    num_done: int = 0
    num_reused: int = 0

    @property
    def num_ahead(self) -> int:
        """Ids that can be fed before the one that gives a token."""
        return len(self.ids) - 1 - self.num_done


class Batch:
    """The rows of one adapter, or of the base. `forward_model`: the causal model itself, not PEFT's wrapper."""

    def __init__(self, forward_model: Any, *, is_reusing: bool = True) -> None:
        self.model = forward_model
        self.config = forward_model.config.get_text_config()
        self.rows: list[Row] = []
        self.is_reusing = is_reusing
        self._cache = SlotCache(self.config.num_hidden_layers)
        self._device = next(forward_model.parameters()).device
        # What the rows behind the living ones still hold.
        self._left: dict[int, list[int]] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens that the buffers have room for."""
        return self._cache.num_rows * self._cache.length

    def num_tokens_with(self, num_reserved: int) -> int:
        """Return what `num_tokens` would be with one more row of so many ids."""
        rows, length = self._size_with(num_reserved)
        return rows * length

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def add(self, row: Row) -> None:
        """Take in a row; what of its prompt a row of the cache holds is copied from there."""
        self._make_room(row.num_reserved)
        slot = len(self.rows)
        if self.is_reusing:
            held = {**{at: some.ids[: some.num_done] for at, some in enumerate(self.rows)}, **self._left}
            common = {at: first_difference(ids, row.ids[:-1]) for at, ids in held.items()}
            best = max(common, key=lambda at: common[at], default=slot)
            row.num_done = row.num_reused = common.get(best, 0)
            if row.num_done and best != slot:
                self._cache.copy_row(best, slot, length=row.num_done)
        self._left.pop(slot, None)
        self.rows.append(row)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def remove(self, row: Row) -> None:
        """Let a row go; the last one takes its place, so that the living rows are the first ones."""
        at, last = self.rows.index(row), len(self.rows) - 1
        mover = self.rows.pop()
        self._left[last] = mover.ids[: mover.num_done]
        if at != last:
            self._cache.copy_row(last, at, length=mover.num_done)
            self.rows[at] = mover

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def step(self, max_tokens: int) -> list[tuple[Row, Scored | int]]:
        """Feed a piece of the new prompts, at most `max_tokens` ids, then one id of every row; return the new tokens.

        A token comes with its log probability if its row asks for it. It is appended to the row's ids.
        """
        new = [at for at, row in enumerate(self.rows) if row.num_ahead > 0]
        if new:
            width = max(max_tokens // len(new), 1)
            self._forward(new, [min(self.rows[at].num_ahead, width) for at in new])
        if all(row.num_ahead for row in self.rows):
            return []
        logits_BV = self._forward(range(len(self.rows)), [1] * len(self.rows))
        ready = [at for at, row in enumerate(self.rows) if row.num_done == len(row.ids)]
        if len(ready) < len(self.rows):
            logits_BV = logits_BV[ready]
        rows = [self.rows[at] for at in ready]
        found: list[tuple[Row, Scored | int]] = []
        for row, logits_V, token in zip(rows, logits_BV, pick(logits_BV, [row.draw for row in rows]), strict=True):
            row.ids.append(token)
            num_likeliest = row.draw.num_logprobs
            told = token if num_likeliest is None else score(logits_V, token, num_likeliest=num_likeliest)
            found.append((row, told))
        return found

    def _forward(self, places: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """Feed the next `counts` ids of the rows at `places`; return logits [B, V] of the last column."""
        rows = [self.rows[at] for at in places]
        width = 1 if max(counts) == 1 else -(-max(counts) // WIDTH_STEP) * WIDTH_STEP
        pieces = [row.ids[row.num_done : row.num_done + count] for row, count in zip(rows, counts, strict=True)]
        ids_BQ = torch.tensor([piece + [0] * (width - len(piece)) for piece in pieces], device=self._device)
        starts_B1 = torch.tensor([[row.num_done] for row in rows], device=self._device)
        # What stands in for missing ids is written behind them, where the row's next ids will overwrite it unseen; at
        # the end of the buffer, into its last place, which no row reserves.
        positions_BQ = (starts_B1 + torch.arange(width, device=self._device)).clamp_(max=self._cache.length - 1)
        num_keys = min(max(row.num_done for row in rows) + width, self._cache.length)
        self._cache.aim(places, positions_BQ, width=num_keys)
        logits_B1V = self.model(
            input_ids=ids_BQ,
            position_ids=positions_BQ,
            attention_mask=attention_masks(self.config, positions_BQ, width=num_keys, dtype=self.model.dtype),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        for row, count in zip(rows, counts, strict=True):
            row.num_done += count
        return logits_B1V[:, -1]

    def _size_with(self, num_reserved: int) -> tuple[int, int]:
        wanted = len(self.rows) + 1
        num_rows = self._cache.num_rows if wanted <= self._cache.num_rows else 1 << (wanted - 1).bit_length()
        longest = max([num_reserved, *(row.num_reserved for row in self.rows)]) + 1
        length = -(-longest // LENGTH_STEP) * LENGTH_STEP
        if not self.rows and self._cache.length > 2 * length:
            return 1, length
        return num_rows, max(length, self._cache.length)

    def _make_room(self, num_reserved: int) -> None:
        num_rows, length = self._size_with(num_reserved)
        if (num_rows, length) == (self._cache.num_rows, self._cache.length):
            return
        if num_rows < self._cache.num_rows:
            self._left = {}
        num_kept = min(num_rows, self._cache.num_rows)
        self._cache.resize(num_rows, length=length, num_kept=num_kept)
