"""What the tests of faults share."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("hurt")

from hurt import data, held_out, whole  # noqa: E402

__all__ = ["data", "held_out", "whole"]


@pytest.fixture(scope="module", autouse=True)
def _short_answers(short_answers: None) -> None:
    """Report cards of hundreds of runs: in this process their answers have two tokens."""
