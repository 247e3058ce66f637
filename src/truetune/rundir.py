"""One run is one folder, the only source of truth about it.

RUN/
  config.yaml   every value in force, loadable again        run.json      what ran: versions, hashes, state
  events.jsonl  one JSON object a line                      steps.jsonl   the row ids of every optimizer step
  data/         prepared tokens, refused.jsonl              checkpoints/  weights + optimizer, every save_steps
  refused.jsonl streamed rows that were refused
  adapter/      the result; of full fine-tuning, model/     (see product documentation in docs/run-folder.md)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.disk import FULL, is_leftover, read_manifest, to_json, write_atomic
from truetune.errors import UserError
from truetune.lock import FILE as LOCK_FILE
from truetune.records import Refusal


class RunDir:
    """Paths of one run, and the few files that are written while it goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.run_json = path / "run.json"
        self.events = path / "events.jsonl"
        self.steps = path / "steps.jsonl"
        self.refused = path / "refused.jsonl"
        self.data = path / "data"
        self.checkpoints = path / "checkpoints"
        self._waiting: dict[Path, bytes] = {}

    @property
    def result(self) -> Path:
        """Where the result is or will be: adapter/, or model/ where run.json says so, since all weights are trained."""
        return self.path / (self.read_info().get("result", "adapter") if self.is_run else "adapter")

    @property
    def result_step(self) -> int | None:
        """The step whose weights the result holds; None if there is none yet."""
        try:
            return int(read_manifest(self.result)["step"])
        except (OSError, ValueError):
            return None

    @property
    def is_run(self) -> bool:
        """True if the folder holds a run."""
        return self.run_json.is_file()

    def create(self) -> None:
        """Make the folders that are filled little by little; the others come whole."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)

    def read_info(self) -> dict[str, Any]:
        """Return run.json."""
        info: dict[str, Any] = json.loads(self.run_json.read_text(encoding="utf-8"))
        return info

    def write_info(self, **values: Any) -> None:
        """Add `values` to run.json, atomically."""
        info = self.read_info() if self.is_run else {}
        write_atomic(self.run_json, to_json(info | values, indent=2) + "\n")

    def append(self, event: dict[str, Any]) -> None:
        """Append one line to events.jsonl."""
        self._append(self.events, event)

    def append_step_rows(self, step: int, row_ids: list[int], *, places: list[str] | None = None) -> None:
        """Append the row ids of one optimizer step to steps.jsonl; of streamed rows, where they stand, too."""
        self._append(self.steps, {"step": step, "rows": row_ids} | ({"where": places} if places else {}))

    def append_refused(self, step: int, rows: Iterable[Refusal]) -> None:
        """Append streamed rows that were refused before the rows of a step were used."""
        for row in rows:
            self._append(self.refused, {"step": step, "where": row.where, "reason": row.reason, "fix": row.fix})

    @property
    def has_waiting_lines(self) -> bool:
        """True if the disk did not take a line yet: it is tried again with the next one."""
        return any(self._waiting.values())

    def sync_lines(self) -> None:
        """Make all lines durable, so that a checkpoint is never newer than what is told of it."""
        for path in (self.events, self.steps, self.refused):
            if self._waiting.get(path):
                _append_bytes(path, self._waiting.pop(path))
            if path.exists():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def _append(self, path: Path, value: dict[str, Any]) -> None:
        """Append a line, or keep it in memory if the disk is full: training need not end for a log."""
        line = self._waiting.pop(path, b"") + (to_json(value) + "\n").encode()
        try:
            _append_bytes(path, line)
        except OSError as error:
            if error.errno not in FULL:
                raise
            self._waiting[path] = line

    def read_events(self) -> Iterator[dict[str, Any]]:
        """Yield the events; a last line cut by a kill is left out."""
        return _read_lines(self.events)

    def read_step_rows(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of steps.jsonl."""
        return _read_lines(self.steps)

    def read_refused(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of refused.jsonl."""
        return _read_lines(self.refused)

    def cut_back(self, step: int) -> None:
        """Drop every event and step line later than `step`, as resume does before it repeats them."""
        for path in (self.events, self.steps, self.refused):
            if path == self.refused and not path.exists():
                continue
            kept = [line for line in _read_lines(path) if line.get("step", -1) <= step]
            write_atomic(path, "".join(to_json(line) + "\n" for line in kept))


def _append_bytes(path: Path, content: bytes) -> None:
    """Append all of it, or nothing."""
    with path.open("ab", buffering=0) as file:
        start, left = file.tell(), memoryview(content)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(start)
            raise


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            value: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        yield value


@dataclass(frozen=True)
class Run:
    """A run: its folder, the steps taken, the last loss and the held-out loss (nats a token) before and after."""

    path: Path
    steps: int
    loss: float | None
    eval_loss_before: float | None
    eval_loss_after: float | None


def outcome(run: RunDir) -> Run:
    """Return what the events of a run say about it."""
    events = list(run.read_events())
    steps = [event for event in events if event["kind"] == "step"]
    losses = {event["step"]: event["eval_loss"] for event in events if event["kind"] == "eval"}
    before = next(iter(losses.values()), None)
    last = next(reversed(losses.values())) if len(losses) > 1 else None
    after = losses.get(run.result_step, last)
    return Run(run.path, len(steps), steps[-1]["loss"] if steps else None, before, after)


def next_run_path(data: str, model: str, *, root: Path = Path("runs")) -> Path:
    """Return `runs/<data>-<model>-NNN` with the first free number."""
    names = (Path(data).stem, Path(model).name.removesuffix(".gguf"))
    stem = "-".join(re.sub(r"[^\w.]+", "-", name).strip("-") or "data" for name in names)
    tails = [path.name.removeprefix(f"{stem}-") for path in root.glob(f"{stem}-*")]
    return root / f"{stem}-{max((int(tail) for tail in tails if tail.isdecimal()), default=0) + 1:03d}"


def list_runs(root: Path) -> list[RunDir]:
    """Return the runs under `root`, oldest first."""
    runs = [RunDir(path.parent) for path in root.glob("*/run.json")]
    return sorted(runs, key=lambda run: (run.read_info().get("started", ""), run.path.name))


def open_output(path: Path, *, resume: bool) -> RunDir:
    """Return the folder of a new run, or of the run to resume; one that was killed before its first file is both.

    Raises: UserError if the folder holds another run or other files, or if there is nothing to resume.
    """
    run = RunDir(path)
    if any(parent.exists() and not parent.is_dir() for parent in path.parents):
        raise UserError("output_below_file", where=str(path), fix="output_other")
    if path.exists() and not path.is_dir():
        raise UserError("output_is_file", where=str(path), fix="output_other")
    if run.is_run:
        if not resume:
            raise UserError("output_has_run", where=str(path), fix="output_resume_or_other")
        return run
    found = list(path.iterdir()) if path.is_dir() else []
    is_begun = bool(found) and all(some.name == LOCK_FILE or is_leftover(some) for some in found)
    if resume and not is_begun:
        raise UserError("output_no_run", where=str(path), fix="output_no_run")
    if found and not is_begun:
        raise UserError("output_not_empty", where=str(path), fix="output_other")
    return run
