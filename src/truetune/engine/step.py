"""Forward and backward of one optimizer step, over padded rows of its pairs.

The pairs of a step are sorted by length and split into forwards; each forward is padded on the right:

    p0 p1 p2 a0 a1 </s> .        Causal attention never looks right, so the padding changes nothing and needs no
    p0 p1 a0 a1 a2 a3 </s>       mask; and where nothing is learned (left of the shortest prompt), no logits are made.

The loss is the sum over learned tokens divided by the learned tokens of the whole step, so it does not depend on how
the step is split (transformers#34191 is the bug of dividing per forward).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from truetune.records import IGNORE_INDEX, Pair

Forward = list[Pair]
"""Pairs that run through the model together."""


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean over the step's learned tokens, in nats; `num_tokens`: tokens computed, padding included."""

    loss: float
    num_learned_tokens: int
    num_tokens: int


def split_forwards(pairs: Sequence[Pair], max_tokens: int) -> list[Forward]:
    """Sort pairs by length and split them so that no forward holds more than `max_tokens` with its padding.

    A pair longer than `max_tokens` has a forward of its own.
    """
    forwards: list[Forward] = []
    for pair in sorted(pairs, key=len):
        if forwards and (len(forwards[-1]) + 1) * len(pair) <= max_tokens:
            forwards[-1].append(pair)
        else:
            forwards.append([pair])
    return forwards


def collate(forward: Forward, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `input_ids_BT` and `labels_BT`; labels are IGNORE_INDEX on prompt and padding, by length, never by id."""
    num_tokens = max(map(len, forward))
    input_ids_BT = torch.full((len(forward), num_tokens), pad_id, dtype=torch.long)
    labels_BT = torch.full_like(input_ids_BT, IGNORE_INDEX)
    for row, pair in enumerate(forward):
        input_ids_BT[row, : len(pair)] = torch.tensor(pair.prompt_ids + pair.answer_ids)
        labels_BT[row, len(pair.prompt_ids) : len(pair)] = torch.tensor(pair.answer_ids)
    return input_ids_BT, labels_BT


def forward_loss(model: Any, forward: Forward, *, pad_id: int) -> torch.Tensor:
    """Return the summed cross-entropy (fp32, nats) over the learned tokens of one forward.

    The logits at position t predict token t + 1, so labels are shifted left by one and the last position goes:

        input    p0 p1 a0 a1 </s>        kept from the shortest prompt's last token on
        kept        ^  ^  ^
        label       a0 a1 </s>
    """
    input_ids_BT, labels_BT = collate(forward, pad_id)
    first = min(len(pair.prompt_ids) for pair in forward) - 1
    device = next(model.parameters()).device
    labels_BK = labels_BT[:, first + 1 :].to(device)
    input_ids_BT = input_ids_BT[:, :-1].to(device)
    # logits_to_keep: heads (scales, soft caps) stay the model's own, and logits nobody needs are not made.
    logits_BKV = model(input_ids=input_ids_BT, logits_to_keep=labels_BK.shape[1], use_cache=False).logits
    return F.cross_entropy(
        logits_BKV.float().flatten(0, 1), labels_BK.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def train_step(
    model: Any,
    pairs: Sequence[Pair],
    *,
    max_tokens: int,
    pad_id: int,
    seeds: tuple[int, int],
    backward: Callable[[torch.Tensor], None],
) -> StepResult:
    """Add the gradient of one optimizer step to the parameters. `seeds`: (run seed, step), for dropout."""
    forwards = split_forwards(pairs, max_tokens)
    num_learned_tokens = sum(len(pair.answer_ids) for pair in pairs)
    loss_sum = 0.0
    for number, forward in enumerate(forwards):
        torch.manual_seed(dropout_seed(*seeds, forward=number))
        loss = forward_loss(model, forward, pad_id=pad_id) / num_learned_tokens
        backward(loss)
        loss_sum += loss.item()
    return StepResult(loss_sum, num_learned_tokens, _num_padded_tokens(forwards))


@torch.no_grad()  # type: ignore[untyped-decorator]
def held_out_loss(model: Any, pairs: Sequence[Pair], *, max_tokens: int, pad_id: int) -> float:
    """Return the mean loss (nats a learned token) of `pairs` without dropout; the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        loss_sum = sum(
            forward_loss(model, forward, pad_id=pad_id).item() for forward in split_forwards(pairs, max_tokens)
        )
    finally:
        model.train(was_training)
    return float(loss_sum) / sum(len(pair.answer_ids) for pair in pairs)


def dropout_seed(seed: int, step: int, *, forward: int) -> int:
    """Return the seed of one forward: a function of its place in the run, so that no RNG state is ever saved."""
    return int(np.random.SeedSequence([seed, step, forward]).generate_state(1, np.uint64)[0] >> 1)


def _num_padded_tokens(forwards: Sequence[Forward]) -> int:
    return sum(len(forward) * max(map(len, forward)) for forward in forwards)
