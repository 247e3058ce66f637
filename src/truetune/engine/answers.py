"""The answers of a forward of preference rows, and the log-probability of each one.

A row is two pairs behind one prompt. In a trie they share the prompt and whatever the answers begin with; an answer's
log-probability is the sum over ITS edges, and an edge may be two answers' own:

    prompt <s> Q       chosen    x y </s>        <s> ─ Q ─ x ─┬─ y          edge   0    1    2    3      4
                       rejected  x z </s>                     └─ z                 Q→x  x→y  x→z  y→</s> z→</s>

    edges_K    0 1 3 | 0 2 4          owners_K   0 0 0 | 1 1 1              edge 0 counts for both
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from truetune.records import Pair


@dataclass(frozen=True)
class Answers:
    """Which edges each answer [B] of a forward of preference rows has; see above.

    `num_row_tokens`: computed for the largest row, which cannot be split.
    """

    pairs: Sequence[Pair]
    is_liked_B: torch.Tensor
    lengths_B: torch.Tensor
    edges_K: torch.Tensor
    owners_K: torch.Tensor
    num_row_tokens: int

    def log_probs(self, losses_E: torch.Tensor) -> torch.Tensor:
        """Return the log-probability [B] of each answer: the sum over its edges."""
        zeros_B = torch.zeros(len(self.pairs), dtype=losses_E.dtype, device=losses_E.device)
        return zeros_B.index_add(0, self.owners_K, -losses_E.index_select(0, self.edges_K))
