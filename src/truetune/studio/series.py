"""events.jsonl as columns, read on as it grows, and curves thinned so that no extreme is lost."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import json as arrow_json

COLUMNS = (
    *("loss", "learning_rate", "grad_norm", "epoch", "rows", "pairs", "learned_tokens", "trie_tokens", "seconds"),
    *("computed_tokens", "memory_bytes", "cpu_percent", "gpu_percent"),
    # Only of a preference loss.
    *("rewards_chosen", "rewards_rejected", "reward_accuracy", "reward_margin"),
)
RATES = {"rows_per_s": "rows", "tokens_per_s": "trie_tokens"}
"""Made of a column and the seconds of the step."""
KEYS = (*COLUMNS, *RATES)

STEP_LINE = b'{"kind": "step"'
SCHEMA = pa.schema([("step", pa.int64()), *((name, pa.float64()) for name in COLUMNS)])
BLOCK_BYTES = 1 << 21
"""Parsed at once by a core; the line of a step has 400."""


class EventLog:
    """The events of a run. `refresh` reads what was added since; after a resume, which cuts the file, all of it again.

    `others`: the events that are no steps, in order.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._inode, self._offset = 0, 0
        self._parts: list[dict[str, np.ndarray]] = []
        self.others: list[dict[str, Any]] = []

    def refresh(self) -> EventLog:
        """Read the whole lines that are new; the last one may be half written."""
        with self._lock:
            try:
                with self._path.open("rb") as file:
                    self._read(file)
            except FileNotFoundError:
                self._forget(0)
        return self

    def _read(self, file: Any) -> None:
        inode, size = _identity(file)
        if inode != self._inode or size < self._offset:
            self._forget(inode)
        file.seek(self._offset)
        data: bytes = file.read()
        data = data[: data.rfind(b"\n") + 1]
        if not data:
            return
        self._offset += len(data)
        lines = data.split(b"\n")
        steps = [line for line in lines if line.startswith(STEP_LINE)]
        self.others += [value for value in map(_parsed, lines) if value is not None]
        if steps:
            self._parts.append(_columns(b"\n".join(steps)))

    def _forget(self, inode: int) -> None:
        self._inode, self._offset, self._parts, self.others = inode, 0, [], []

    def columns(self) -> dict[str, np.ndarray]:
        """Return the values of every step, all of one moment: each [S], NaN where not known; `step` whole numbers."""
        with self._lock:
            self._parts = [{key: _joined(self._parts, key) for key in SCHEMA.names}]
            return self._parts[0] | {key: self._parts[0][of] / self._parts[0]["seconds"] for key, of in RATES.items()}

    def column(self, name: str) -> np.ndarray:
        """Return one of them."""
        return self.columns()[name]


def _identity(file: Any) -> tuple[int, int]:
    told = os.fstat(file.fileno())
    return told.st_ino, told.st_size


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return an event that is no step; None for a step and for a line that a kill cut before others were added."""
    if not line or line.startswith(STEP_LINE):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _columns(data: bytes) -> dict[str, np.ndarray]:
    """Parse the lines of steps, on every core: a curve of 100,000 is to be there at once (bench/studio.py)."""
    try:
        table = _table(data)
    except pa.ArrowInvalid:
        # A line that a kill cut, with others after it: line by line, then, without those.
        table = pa.concat_tables(found for found in map(_table_or_none, data.split(b"\n")) if found is not None)
    return {
        name: np.asarray(table[name].to_numpy(), np.int64 if name == "step" else np.float64) for name in SCHEMA.names
    }


def _table(data: bytes) -> pa.Table:
    return arrow_json.read_json(
        pa.BufferReader(data),
        read_options=arrow_json.ReadOptions(block_size=BLOCK_BYTES),
        parse_options=arrow_json.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="ignore"),
    )


def _table_or_none(line: bytes) -> pa.Table | None:
    try:
        return _table(line)
    except pa.ArrowInvalid:
        return None


def _joined(parts: Sequence[dict[str, np.ndarray]], name: str) -> np.ndarray:
    if not parts:
        return np.zeros(0, np.int64 if name == "step" else np.float64)
    return parts[0][name] if len(parts) == 1 else np.concatenate([part[name] for part in parts])


def thinned(columns: Sequence[np.ndarray], max_points: int) -> np.ndarray:
    """Return which points of curves [S] to draw: of each stretch, the lowest and the highest of every curve.

    stretches   ......|......|......|      a spike of one step in 100,000 stays, and so does its step
    drawn       ^   v | ^  v |v    ^|
    """
    size = len(columns[0])
    if size <= max_points:
        return np.arange(size)
    num_stretches = max(max_points // (2 * len(columns)), 1)
    bounds = np.linspace(0, size, num_stretches + 1).astype(np.int64)
    # A curve and its mirror: the lowest of that is the highest of this. What is not known is neither.
    both = [side for values in columns for side in (values, -values)]
    places = [_lowest_places(np.where(np.isnan(values), np.inf, values), bounds) for values in both]
    return np.unique(np.concatenate([np.array([0, size - 1]), *places]))


def _lowest_places(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return the place of the lowest value of each stretch."""
    return np.array([start + int(values[start:stop].argmin()) for start, stop in itertools.pairwise(bounds)])
