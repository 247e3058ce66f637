"""How far two models are apart where it matters: at the tokens of answers, each given the same tokens before it.

token       p0 p1 p2 a0 a1 stop          p prompt, a answer
compared          ^  ^  ^                the logits that predict a0, a1 and the stop token
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from truetune.records import Pair

MAX_ROWS = 20
MAX_TOKENS = 768
"""Answer tokens compared; the logits of 768 tokens of 152,000 words take 0.5 GB."""

Logits = Sequence[torch.Tensor]
"""For each pair, logits [its answer tokens, V] in fp32."""


@dataclass(frozen=True)
class Drift:
    """`kl`: nats a token from the reference. `same_best`: share of tokens with the same likeliest token.

    `largest`: of all differences of a logit. `gap`: where the likeliest token is another one, by how much the reference
    preferred its own, at most (logits).
    """

    num_pairs: int
    num_tokens: int
    kl: float
    same_best: float
    largest: float
    gap: float

    def facts(self) -> dict[str, Any]:
        """Return the numbers for a text."""
        return {
            "pairs": self.num_pairs,
            "tokens": self.num_tokens,
            "kl": self.kl,
            "same": self.same_best,
            "largest": self.largest,
            "gap": self.gap,
        }


def chosen(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the first pairs that are compared: few enough that their logits fit into memory."""
    taken: list[Pair] = []
    num_tokens = 0
    for pair in pairs:
        num_tokens += len(pair.answer_ids)
        if taken and num_tokens > MAX_TOKENS:
            break
        taken.append(pair)
    return taken


def answer_logits(pairs: Sequence[Pair], *, of: Callable[[list[int]], torch.Tensor]) -> Logits:
    """Return the logits at the answers. `of`: ids → logits [T, V], one row for each id."""
    found = []
    for pair in pairs:
        logits_TV = of([*pair.prompt_ids, *pair.answer_ids])
        found.append(logits_TV[len(pair.prompt_ids) - 1 : -1].float().clone())
    return found


def model_logits(model: Any) -> Callable[[list[int]], torch.Tensor]:
    """Return the function ids → logits [T, V] of a transformers or PEFT model."""

    def of(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits_TV: torch.Tensor = model(torch.tensor([ids], device=model.device)).logits[0].cpu()
        return logits_TV

    return of


def compare(reference: Logits, found: Logits) -> Drift:
    """Return how far `found` is from `reference`; not a number anywhere counts as infinitely far."""
    kl, num_same, num_tokens = 0.0, 0, 0
    largest, gap = 0.0, 0.0
    for ours_TV, theirs_TV in zip(reference, found, strict=True):
        log_p, log_q = ours_TV.log_softmax(-1), theirs_TV.log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        best, other = ours_TV.argmax(-1, keepdim=True), theirs_TV.argmax(-1, keepdim=True)
        gaps = ours_TV.gather(-1, best) - ours_TV.gather(-1, other)
        num_same += int((best == other).sum())
        num_tokens += len(ours_TV)
        largest = max(largest, float((ours_TV - theirs_TV).abs().nan_to_num(torch.inf).max()))
        gap = max(gap, float(gaps.max()))
    # Rounding makes tiny negative sums of what is the same.
    mean = max(kl / num_tokens, 0.0) if kl == kl else float("inf")
    return Drift(len(reference), num_tokens, mean, num_same / num_tokens, largest, gap)
