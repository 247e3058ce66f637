"""The values of the path."""

from __future__ import annotations

from truetune.records import IGNORE_INDEX, Pair


def test_length_of_a_pair() -> None:
    """Prompt and answer together."""
    assert [len(pair) for pair in (Pair((1, 2, 3), (4, 5)), Pair((1,), (2,)))] == [5, 2]


def test_ignored_label_is_the_one_of_torch() -> None:
    """The default of torch's cross_entropy, so that other tools' losses agree."""
    import inspect

    import torch

    assert inspect.signature(torch.nn.functional.cross_entropy).parameters["ignore_index"].default == IGNORE_INDEX
