"""The values of the path."""

from __future__ import annotations

from truetune.records import IGNORE_INDEX, Pair, Row


def test_counts_of_a_row() -> None:
    """Tokens of all pairs, and the learned ones of them."""
    row = Row(0, "a:1", (Pair((1, 2, 3), (4, 5)), Pair((1,), (2,))))
    assert [len(pair) for pair in row.pairs] == [5, 2]
    assert (row.num_tokens, row.num_learned_tokens) == (7, 3)


def test_ignored_label_is_the_one_of_torch() -> None:
    """The default of torch's cross_entropy, so that other tools' losses agree."""
    import inspect

    import torch

    assert inspect.signature(torch.nn.functional.cross_entropy).parameters["ignore_index"].default == IGNORE_INDEX
