"""Every fault has an exit code, three parts, and a text in both languages."""

from __future__ import annotations

import pytest

from truetune import errors
from truetune.errors import (
    Interrupted,
    NumericsError,
    RowError,
    Stopped,
    ToldElsewhere,
    TruetuneError,
    UserError,
    UserErrors,
    out_of_memory,
)

KINDS: list[tuple[TruetuneError, int]] = [
    (UserError("no_data", where="data", fix="no_data"), 2),
    (RowError("row_empty_text", where="a.json:3", fix="row_empty_text", name="output"), 2),
    (UserErrors([UserError("no_data", where="data", fix="no_data")]), 2),
    (out_of_memory("m"), 3),
    (NumericsError("not_finite", where="step 3", fix="not_finite", loss="nan", grad_norm="1", rows="a:1"), 4),
    (Stopped(2, where="runs/x"), 130),
    (Stopped(15, where="runs/x"), 143),
    (Interrupted(), 130),
    (ToldElsewhere(4), 4),
]


@pytest.mark.parametrize(("error", "code"), KINDS, ids=lambda value: type(value).__name__)
def test_each_kind_has_its_exit_code(error: TruetuneError, code: int) -> None:
    assert error.exit_code == code


def test_the_table_holds_every_kind() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TruetuneError)}
    assert kinds - {TruetuneError} == {type(error) for error, _ in KINDS}
    assert len(kinds) == 9


@pytest.mark.parametrize(("error", "code"), KINDS, ids=lambda value: type(value).__name__)
def test_text_starts_with_where_and_ends_with_the_fix(error: TruetuneError, code: int) -> None:
    what, fix = str(error).split("\n")
    assert what.startswith(f"{error.where}: ")
    assert len(what) > len(error.where) + 4
    assert fix.startswith("  ")
    assert fix.strip()


def test_values_fill_what_and_fix() -> None:
    error = UserError("row_missing_key", where="rows.json:7", fix="row_missing_key", name="output", found="input, x")
    assert str(error) == 'rows.json:7: the key "output" is missing (found: input, x)\n  Add "output" to this row.'


def test_braces_in_values_are_not_filled_again() -> None:
    assert "{name}" in str(UserError("show", where="--show", fix="show", value="{name} {0}"))


def test_several_faults_are_joined_in_order() -> None:
    faults = [
        UserError("no_data", where="data", fix="no_data"),
        UserError("no_model", where="--model", fix="no_model"),
        UserError("data_empty", where="a.json", fix="data_empty"),
    ]
    joined = UserErrors(faults)
    assert str(joined) == "\n".join(map(str, faults))
    assert joined.errors == tuple(faults)
    assert (joined.key, joined.where, joined.fix) == ("no_data", "data", "no_data")


def test_only_user_faults_are_user_errors() -> None:
    assert [isinstance(error, UserError) for error, _ in KINDS] == [True] * 3 + [False] * 6


def test_stopped_names_the_command_that_goes_on() -> None:
    assert "--resume --output-dir runs/x" in str(Stopped(15, where="runs/x"))


def test_a_kind_is_caught_as_its_parents() -> None:
    with pytest.raises(UserError):
        raise RowError("row_empty_text", where="a:1", fix="row_empty_text", name="output")
    with pytest.raises(TruetuneError):
        raise Interrupted
