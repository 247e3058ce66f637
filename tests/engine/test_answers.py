"""Log-probabilities of answers from the losses of edges, as the module draws them."""

from __future__ import annotations

import torch

from truetune.engine.answers import Answers
from truetune.records import Pair


def test_an_edge_counts_for_every_answer_that_has_it() -> None:
    """The drawing: edge 0 belongs to both; its gradient is the sum of what both want of it."""
    answers = Answers(
        pairs=[Pair((1, 2), (3, 4, 9)), Pair((1, 2), (3, 5, 9))],
        is_liked_B=torch.tensor([True, False]),
        lengths_B=torch.tensor([3, 3]),
        edges_K=torch.tensor([0, 1, 3, 0, 2, 4]),
        owners_K=torch.tensor([0, 0, 0, 1, 1, 1]),
        num_row_tokens=5,
    )
    losses_E = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0], requires_grad=True)
    log_probs_B = answers.log_probs(losses_E)
    assert log_probs_B.tolist() == [-5.5, -10.5]
    (gradient_E,) = torch.autograd.grad(log_probs_B @ torch.tensor([3.0, -1.0]), [losses_E])
    assert gradient_E.tolist() == [-2.0, -3.0, 1.0, -3.0, 1.0]
