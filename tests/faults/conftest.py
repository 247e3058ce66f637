"""What the tests of faults share."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("hurt")

from hurt import data, held_out, whole  # noqa: E402

__all__ = ["data", "held_out", "whole"]
