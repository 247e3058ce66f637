"""The pairs of a step, dealt to ranks: by tokens, evenly, and pairs that share prefixes together.

    sorted      S A x   S A y   S B z   T u          tokens that are new behind the pair before: 3 1 2 2
    two ranks  └── rank 0: 4 ──┘└─ rank 1: 5 ──┘     a rank's first pair counts whole: S B z is 3

A function of the pairs alone: every rank deals them itself, and takes its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch

from truetune.engine.step import Engine, Forward, make_forwards
from truetune.engine.trie import num_common
from truetune.records import Pair


def deal(pairs: Sequence[Pair], num_ranks: int, *, is_shared: bool) -> list[list[Pair]]:
    """Return each rank's pairs, so that the most tokens of a rank are as few as a cut of the sorted pairs allows.

    `is_shared`: prefixes are computed once. A rank may get nothing.
    """
    if num_ranks == 1 or not pairs:
        return [list(pairs), *([] for _ in range(num_ranks - 1))]
    ordered = sorted(pairs, key=_tokens if is_shared else len)
    whole = [len(pair) - 1 for pair in ordered]
    new = list(whole)
    if is_shared:
        ids = [_tokens(pair)[:-1] for pair in ordered]
        new[1:] = [len(b) - num_common(a, b) for a, b in itertools.pairwise(ids)]
    return [ordered[part] for part in cut(new, whole, num_ranks=num_ranks)]


def cut(new: Sequence[int], whole: Sequence[int], *, num_ranks: int) -> list[slice]:
    """Return each rank's part of a row of things, so that the largest part is as small as a cut allows.

    `new`: what each one costs behind the one before; `whole`: as the first of a part. A part may be empty.
    """
    most, least = sum(whole), -(-sum(new) // num_ranks)
    while least < most:
        middle = (least + most) // 2
        starts = _starts(new, whole, most=middle)
        if starts is None or len(starts) > num_ranks:
            least = middle + 1
        else:
            most = middle
    starts = _starts(new, whole, most=most) or []
    starts += [len(new)] * (num_ranks + 1 - len(starts))
    return [slice(start, end) for start, end in itertools.pairwise(starts)]


def _tokens(pair: Pair) -> tuple[int, ...]:
    return pair.prompt_ids + pair.answer_ids


def _starts(new: Sequence[int], whole: Sequence[int], *, most: int) -> list[int] | None:
    """Return where each rank begins if none takes more than `most` tokens and each as much as it can; None: it cannot.

    To begin later never costs the next rank more, since what it leaves out holds its first pair's prefix.
    """
    starts: list[int] = []
    load = most
    for number, (num_new, num_whole) in enumerate(zip(new, whole, strict=True)):
        if not starts or load + num_new > most:
            if num_whole > most:
                return None
            starts.append(number)
            load = num_whole
        else:
            load += num_new
    return starts


def filled(engine: Engine, forwards: Sequence[Forward], *, num_forwards: int) -> list[Forward]:
    """Return the forwards with empty ones behind them, up to `num_forwards`: a sharded base runs on all ranks or none.

    An empty one is a pair of two tokens whose weight is zero: it adds nothing to the loss, and nothing to a gradient.
    """
    missing = num_forwards - len(forwards)
    if missing <= 0:
        return list(forwards)
    empty = make_forwards(engine, [Pair((engine.pad_id,), (engine.pad_id,))])[0]
    empty = replace(empty, weights_E=torch.zeros_like(empty.weights_E))
    return [*forwards, *[empty] * missing]
