"""Every fault a user can meet, with the exit code it leads to.

    TruetuneError
    ├── UserError         2   data, configuration, arguments
    │   ├── RowError          one refused row; collected and counted, not raised at the user one by one
    │   └── UserErrors        several at once, so that one round trip mends them all
    ├── MachineError      3   disk, memory, lock, permissions
    ├── NumericsError     4   a loss or gradient that is not finite
    ├── Stopped     130/143   SIGINT or SIGTERM in training; the state is saved
    ├── Interrupted     130   Ctrl-C anywhere else
    └── ToldElsewhere         another rank has told it, with its exit code

A fault carries catalogue keys, not text, so that it can be shown in English and in Chinese.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any


class TruetuneError(Exception):
    """One fault: where it is, what it is and how to fix it.

    `key` names the text "error.KEY", `fix` the text "fix.FIX"; `values` fill the braces of both.
    """

    exit_code = 1

    def __init__(self, key: str, *, where: str, fix: str, **values: Any) -> None:
        super().__init__(key)
        self.key = key
        self.where = where
        self.fix = fix
        self.values = values

    def __str__(self) -> str:
        from truetune.messages import text

        what = text(f"error.{self.key}", **self.values)
        return f"{self.where}: {what}\n  {text(f'fix.{self.fix}', **self.values)}"


class UserError(TruetuneError):
    """The user's data, configuration or arguments are wrong."""

    exit_code = 2


class RowError(UserError):
    """One row is refused; `where` is its "file:line"."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as what it was made of; its values as texts, as they are shown."""
        values = {name: str(value) for name, value in self.values.items()}
        return partial(RowError, self.key, where=self.where, fix=self.fix, **values), ()


class UserErrors(UserError):
    """Several faults found in one pass."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        first = errors[0]
        super().__init__(first.key, where=first.where, fix=first.fix, **first.values)
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


class MachineError(TruetuneError):
    """The machine cannot do it: disk, memory, lock, permissions."""

    exit_code = 3


def out_of_memory(where: str) -> MachineError:
    """Return the fault that memory ran out, with what is used and what is free."""
    import psutil

    used, free = psutil.Process().memory_info().rss, psutil.virtual_memory().available
    return MachineError("out_of_memory", where=where, fix="out_of_memory", used=used / 1e9, free=free / 1e9)


class NumericsError(TruetuneError):
    """A loss or a gradient is not finite."""

    exit_code = 4


class Interrupted(TruetuneError):
    """Ctrl-C outside of training, or a second one in it."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("interrupted", where="truetune", fix="interrupted")


class Stopped(TruetuneError):
    """The run was stopped by a signal, after its state was saved."""

    def __init__(self, signal_number: int, *, where: str) -> None:
        super().__init__("stopped", where=where, fix="resume", path=where)
        self.exit_code = 128 + signal_number


class ToldElsewhere(TruetuneError):
    """Several ranks met one fault, or one fault of one rank: another one tells it."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("rank_lost", where="ranks", fix="rank_lost")
        self.exit_code = exit_code
