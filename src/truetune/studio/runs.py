"""What run folders say, read while they are written: the list of runs, one run, its curves, the rows of a step."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from truetune.config import load_yaml
from truetune.disk import read_manifest
from truetune.errors import TruetuneError, UserError
from truetune.lock import owner_of
from truetune.report import CARD, PAGE
from truetune.rundir import RunDir
from truetune.studio.series import KEYS, EventLog, thinned

KILLED = "killed"
MAX_POINTS = 20_000


class Runs:
    """The runs below some folders: those in `ROOT/runs` and in `ROOT` itself."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots
        self._logs: dict[Path, EventLog] = {}

    def named(self) -> dict[str, RunDir]:
        """Return the runs by name, newest first; of two with one name the second is called NAME~2."""
        found: dict[str, RunDir] = {}
        for folder in [place for root in self._roots for place in (root / "runs", root)]:
            for run in _found(folder):
                numbered = (run.path.name if n == 1 else f"{run.path.name}~{n}" for n in range(1, 1000))
                if run.path not in [other.path for other in found.values()]:
                    found[next(name for name in numbered if name not in found)] = run
        return found

    def run(self, name: str) -> RunDir:
        """Return the run of that name.

        Raises: UserError if there is none.
        """
        run = self.named().get(name)
        if run is None:
            raise UserError("studio_missing", where=name, fix="studio_missing")
        return run

    def log(self, run: RunDir) -> EventLog:
        """Return the events of a run, as far as they are written."""
        return self._logs.setdefault(run.path, EventLog(run.events)).refresh()

    def listed(self) -> list[dict[str, Any]]:
        """Return what the list of runs shows."""
        return [self.summary(name, run) for name, run in self.named().items()]

    def summary(self, name: str, run: RunDir) -> dict[str, Any]:
        """Return name, state, data, model, steps and losses of a run. Held-out losses: before, after, lowest."""
        info, log = _info(run), self.log(run)
        found = log.columns()
        losses, steps = found["loss"], found["step"]
        held_out = _held_out(log)
        return {
            "name": name,
            "path": str(run.path),
            "state": state_of(run, info),
            "error": info.get("error"),
            "started": info.get("started"),
            "data": info.get("data", []),
            "model": info.get("model"),
            "steps": int(steps[-1]) if len(steps) else 0,
            "total_steps": info.get("steps"),
            "loss": float(losses[-1]) if len(losses) else None,
            "eval_loss_before": held_out.get(0),
            "eval_loss_after": held_out.get(run.result_step or -1, next(reversed(held_out.values()), None)),
            "result_step": run.result_step,
        }

    def whole(self, name: str) -> dict[str, Any]:
        """Return all that a run's folder holds about it, but its curves and rows."""
        run = self.run(name)
        log = self.log(run)
        held_out, found = _held_out(log), log.columns()
        return {
            **self.summary(name, run),
            "info": _info(run),
            "config": _config(run.config),
            "checkpoints": [one | {"eval_loss": held_out.get(one["step"])} for one in _checkpoints(run.checkpoints)],
            "report": _json(run.path / CARD),
            "has_report_page": (run.path / PAGE).is_file(),
            "store": str(run.data),
            "events": [event for event in log.others if event.get("kind") not in ("sample", "eval")],
            "keys": [key for key in KEYS if not np.isnan(found[key]).all()],
        }

    def samples(self, name: str) -> list[dict[str, Any]]:
        """Return the "sample" events of a run, in order."""
        return [event for event in self.log(self.run(name)).others if event.get("kind") == "sample"]

    def series(self, name: str, keys: Sequence[str], *, first: int, last: int | None, points: int) -> dict[str, Any]:
        """Return curves between two steps, thinned to about `points`, and all held-out losses.

        Raises: UserError for a key that no step has.
        """
        for key in keys:
            if key not in KEYS:
                raise UserError("studio_key", where=key, fix="studio_key", known=", ".join(KEYS))
        log = self.log(self.run(name))
        found = log.columns()
        steps = found["step"]
        start = int(np.searchsorted(steps, first))
        stop = len(steps) if last is None else int(np.searchsorted(steps, last, side="right"))
        columns = {key: found[key][start:stop] for key in keys}
        places = thinned(list(columns.values()), min(points, MAX_POINTS)) if columns else np.zeros(0, np.int64)
        return {
            "step": steps[start:stop][places].tolist(),
            **{key: _plain(values[places]) for key, values in columns.items()},
            "eval": [[step, loss] for step, loss in _held_out(log).items()],
            "total": len(steps),
        }

    def step(self, name: str, step: int) -> tuple[RunDir, dict[str, Any], list[int]]:
        """Return the run, the event of a step and the ids of its rows.

        Raises: UserError if the step was not taken.
        """
        run = self.run(name)
        found = self.log(run).columns()
        steps, row_ids = found["step"], _step_line(run.steps, step).get("rows")
        at = int(np.searchsorted(steps, step))
        if at >= len(steps) or steps[at] != step or row_ids is None:
            raise UserError("studio_step", where=f"{name}, {step}", fix="studio_step", count=len(steps))
        event = {key: _plain(found[key][at : at + 1])[0] for key in KEYS}
        return run, {"kind": "step", "step": step, **event}, row_ids

    def stop(self, name: str) -> None:
        """Send SIGINT to the process that writes a run, if it is on this machine: it finishes its step and saves."""
        owner = owner_of(self.run(name).path)
        if owner is None or not isinstance(owner["pid"], int) or owner["host"] != os.uname().nodename:
            raise UserError("studio_not_running", where=name, fix="studio_not_running")
        os.kill(owner["pid"], signal.SIGINT)


def _found(folder: Path) -> list[RunDir]:
    """Return the runs of a folder, newest first."""
    runs = [RunDir(path.parent) for path in folder.glob("*/run.json")]
    return sorted(runs, key=lambda run: (str(_info(run).get("started")), run.path.name), reverse=True)


def _info(run: RunDir) -> dict[str, Any]:
    """Return run.json; of one that cannot be read, that. The other runs are shown all the same."""
    try:
        return run.read_info()
    except (OSError, ValueError) as error:
        return {"state": "failed", "error": f"{run.run_json.name}: {error}"}


def state_of(run: RunDir, info: dict[str, Any]) -> str:
    """Return running, done, stopped or failed; killed if it says running and nobody writes into it."""
    state = str(info.get("state"))
    return KILLED if state == "running" and owner_of(run.path) is None else state


def _held_out(log: EventLog) -> dict[int, float | None]:
    """Return the held-out loss by step."""
    return {event["step"]: event["eval_loss"] for event in log.others if event.get("kind") == "eval"}


def _plain(values: np.ndarray) -> list[float | None]:
    """Return numbers for JSON, which has none that is not finite."""
    return [float(value) if np.isfinite(value) else None for value in values]


def row_places(run: RunDir, step: int) -> list[str]:
    """Return where the rows of a step stand in their files: told of streamed ones, which are not kept."""
    return list(_step_line(run.steps, step).get("where", []))


def _step_line(path: Path, step: int) -> dict[str, Any]:
    """Return the line of a step in steps.jsonl, {} if there is none. Lines are found by their starts."""
    start = f'{{"step": {step},'.encode()
    try:
        with path.open("rb") as file:
            found = next((line for line in file if line.startswith(start)), b"")
        line: dict[str, Any] = json.loads(found)
    except (OSError, ValueError):
        return {}
    return line


def _config(path: Path) -> dict[str, Any]:
    try:
        return load_yaml(path)[0]
    except TruetuneError:
        return {}


def _checkpoints(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the checkpoints that are complete: their manifests are the last that is written."""
    for path in sorted(folder.glob("checkpoint-*")):
        try:
            manifest = read_manifest(path)
        except (OSError, ValueError):
            continue
        num_bytes = sum(file["bytes"] for file in manifest["files"].values())
        yield {"name": path.name, "path": str(path), "step": manifest.get("step"), "bytes": num_bytes}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
