"""What is counted on the way from files to rows, batch by batch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field

from truetune.errors import RowError


@dataclass
class Tally:
    """What the rows themselves do not say. `refused`: in the order of the files. `formats`: rows of each.

    `num_split`: texts that became several rows; `num_added`: rows that this made beyond the texts themselves.
    """

    num_read: int = 0
    refused: list[RowError] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    num_cut: int = 0
    num_split: int = 0
    num_added: int = 0
    num_empty_thinking: int = 0

    def __iadd__(self, other: Tally) -> Tally:
        """Count what the next batch has counted, too."""
        self.num_read += other.num_read
        self.refused += other.refused
        self.formats += other.formats
        self.ignored += other.ignored
        self.num_cut += other.num_cut
        self.num_split += other.num_split
        self.num_added += other.num_added
        self.num_empty_thinking += other.num_empty_thinking
        return self

    def to_json(self) -> str:
        """Return the tally as text."""
        refused = [(row.key, row.where, row.fix, {k: str(v) for k, v in row.values.items()}) for row in self.refused]
        return json.dumps(vars(self) | {"refused": refused})

    @classmethod
    def from_json(cls, text: str) -> Tally:
        """Return the tally that `to_json` wrote."""
        values = json.loads(text)
        values["refused"] = [RowError(key, where=where, fix=fix, **rest) for key, where, fix, rest in values["refused"]]
        return cls(**values | {name: Counter(values[name]) for name in ("formats", "ignored")})
