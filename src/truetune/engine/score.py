"""What a model makes of each learned token of each pair: its loss, and whether it would have written it.

Computed by the forwards of training, so that a common prefix is read once, and taken apart by pair:

    pair     <sys> S | A x </s>          edges    S→A  A→x  x→</s>
    losses             .7 .1 .0          one for each of the pair's `answer_ids`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from truetune.engine.step import Engine, Forward, evaluating, forward_scores, grouped, running
from truetune.engine.trie import path_of
from truetune.records import Pair, Trie


@dataclass(frozen=True)
class Score:
    """One pair, token by token of its `answer_ids`: losses [A] (nats), and which tokens were the likeliest [A]."""

    losses_A: np.ndarray
    is_likeliest_A: np.ndarray


def score(engine: Engine, pairs: Sequence[Pair]) -> list[Score]:
    """Return the score of each pair, in their order, without dropout; the model's mode is restored."""
    # Equal pairs are one computation, and one entry here.
    scores: dict[Pair, Score] = {}
    with evaluating(engine.model), running(engine):
        for group, forward in grouped(engine, pairs):
            losses_E, is_likeliest_E = (values.cpu().numpy() for values in forward_scores(engine, forward))
            for pair, at in zip(group, places_of(forward, group), strict=True):
                scores[pair] = Score(losses_E[at].astype(np.float64), is_likeliest_E[at])
    return [scores[pair] for pair in pairs]


def places_of(forward: Forward, pairs: Sequence[Pair]) -> Iterator[np.ndarray]:
    """Yield where each pair's edges are among those of the forward of `pairs`: [A], one for each answer token."""
    if forward.layout is not None:
        yield from (_in_trie(forward.layout.trie, pair) for pair in pairs)
        return
    # Of padded rows, one pair's are behind the other's.
    start = 0
    for pair in pairs:
        yield np.arange(start, start + len(pair.answer_ids))
        start += len(pair.answer_ids)


def _in_trie(trie: Trie, pair: Pair) -> np.ndarray:
    """Return where a pair's edges are among the trie's, which are sorted by (parent, target)."""
    nodes = path_of(trie, (pair.prompt_ids + pair.answer_ids)[:-1])
    parents_A, targets_A = nodes[len(pair.prompt_ids) - 1 :], np.array(pair.answer_ids)
    width = int(trie.targets_E.max()) + 1
    places_A: np.ndarray = np.searchsorted(trie.parents_E * width + trie.targets_E, parents_A * width + targets_A)
    return places_A


def mean_loss(scores: Sequence[Score]) -> float:
    """Return the mean loss (nats a learned token) over all tokens of `scores`."""
    return float(np.concatenate([score.losses_A for score in scores]).mean())
