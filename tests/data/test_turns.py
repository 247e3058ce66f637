"""Turns one by one; refusals of whole rows are in test_formats.py."""

from __future__ import annotations

import pytest

from truetune.data.turns import FLAGS, ROLES, SHAREGPT_ROLES, check_order, read_turn
from truetune.errors import RowError


def test_roles_of_sharegpt_are_roles() -> None:
    assert set(SHAREGPT_ROLES.values()) == set(ROLES)


@pytest.mark.parametrize("role", ROLES)
def test_a_turn_keeps_its_text_and_nothing_is_added(role: str) -> None:
    turn = {"role": role, "content": " a\r\n"}
    assert read_turn("x:1", turn, name="messages[1]") == turn
    assert read_turn("x:1", turn | dict.fromkeys(FLAGS), name="messages[1]") == turn


def test_orders_that_are_right_and_wrong() -> None:
    """All orders of up to five turns, against the grammar written as a pattern."""
    import itertools
    import re

    # c: an assistant turn that calls a tool.
    right = re.compile(r"s?(u(ct+)*(a|c$))*(?<=[ac])")
    found = 0
    for length in range(1, 6):
        for letters in itertools.product("suact", repeat=length):
            turns = [
                {"role": {"s": "system", "u": "user", "a": "assistant", "c": "assistant", "t": "tool"}[letter]}
                | ({"tool_calls": [1]} if letter == "c" else {})
                for letter in letters
            ]
            order = "".join(letters)
            try:
                check_order("x:1", turns)
                is_right = True
            except RowError:
                is_right = False
            assert is_right == bool(right.fullmatch(order)), order
            found += is_right
    assert found == 14
