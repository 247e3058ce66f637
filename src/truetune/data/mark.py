"""A place in a file between two rows, from which reading goes on to the same rows, and the reader's finger on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Mark:
    """`rows`: rows of the file before it. What follows is of JSON alone, where it can be found without reading.

    `byte`, `line`, `column`: bytes of the file, the line and the characters of it before the place; `last_place`: the
    "file:line" of the row before it; `is_array`: whether the rows are elements of one array.
    """

    rows: int = 0
    byte: int = 0
    line: int = 1
    column: int = 0
    last_place: str = ""
    is_array: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


class Window(Protocol):
    """What a reader of JSON sees of its file."""

    def place(self) -> tuple[int, int, int]:
        """Return the byte, line and column behind the row that was given out last."""


class Cursor:
    """Where a reader stands; it moves the cursor with each row. `start`: the mark that it began at."""

    def __init__(self, start: Mark | None = None) -> None:
        self.start = start or Mark()
        self.rows = self.start.rows
        self.last_place, self.is_array = self.start.last_place, self.start.is_array
        self.window: Window | None = None

    def mark(self) -> Mark:
        """Return the place behind the row that was given out last. Not kept for each row, since it takes a while."""
        if self.window is None:
            return Mark(self.rows)
        return Mark(self.rows, *self.window.place(), self.last_place, self.is_array)
