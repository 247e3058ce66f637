"""Logits → tokens: each row by its own wishes and its own random numbers, whatever else is in the batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

NUM_LIKELIEST = 256
"""Tokens that are sorted first for top_p: they nearly always hold all of it, and sorting 150,000 takes 8 ms a row."""


@dataclass(frozen=True)
class Scored:
    """A token, its log probability, and the likeliest tokens with theirs (raw: before temperature and top_p)."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass
class Draw:
    """How a row is drawn. `num_logprobs`: likeliest tokens to tell with each one; None: no log probabilities."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    num_logprobs: int | None = None
    chance: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)


def pick(logits_BV: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Return a token for each row of logits [B, V]: the likeliest at temperature 0, else a drawn one."""
    tokens: list[int] = logits_BV.argmax(dim=-1).tolist()
    drawn = [row for row, draw in enumerate(draws) if draw.temperature > 0]
    if not drawn:
        return tokens
    temperatures = torch.tensor([[draws[row].temperature] for row in drawn], device=logits_BV.device)
    scaled_BV = logits_BV[drawn].float() / temperatures
    probabilities_BV = scaled_BV.softmax(dim=-1)
    for row, probabilities_V in zip(drawn, probabilities_BV, strict=True):
        tokens[row] = _draw(probabilities_V, draws[row])
    return tokens


def _draw(probabilities_V: torch.Tensor, draw: Draw) -> int:
    """Return the token at which the running sum of probabilities passes a random share of their total."""
    chance = draw.chance.random()
    if draw.top_p >= 1:
        sums = probabilities_V.double().cumsum(0)
        return _passed(sums, chance)
    for count in (min(NUM_LIKELIEST, len(probabilities_V)), len(probabilities_V)):
        likeliest, tokens = probabilities_V.topk(count)
        sums = likeliest.double().cumsum(0)
        if sums[-1] >= draw.top_p:
            break
    # The token that reaches top_p still belongs.
    num_kept = min(int((sums < draw.top_p).sum()) + 1, count)
    return int(tokens[_passed(sums[:num_kept], chance)])


def _passed(sums: torch.Tensor, chance: float) -> int:
    """Return the first index whose sum is above `chance` of the last sum."""
    at = int(torch.searchsorted(sums, sums[-1:] * chance, right=True))
    return min(at, len(sums) - 1)


def score(logits_V: torch.Tensor, token: int, *, num_likeliest: int) -> Scored:
    """Return the log probability of a token, and the likeliest ones."""
    logprobs_V = logits_V.float().log_softmax(dim=-1)
    values, tokens = logprobs_V.topk(num_likeliest)
    return Scored(token, float(logprobs_V[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
