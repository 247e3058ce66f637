"""Hands each event of a run to the run's files, the trackers and the screen; none of the last two can end a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from truetune.console import Console, Steps
from truetune.output import record
from truetune.rundir import RunDir
from truetune.trackers import Trackers


@dataclass
class Teller:
    """Who is told. `logging_steps`: how often a screen without a bar is told of a step."""

    run: RunDir
    trackers: Trackers
    console: Console
    screen: Steps
    logging_steps: int
    _said: set[str] = field(default_factory=set)

    def tell(self, event: dict[str, Any]) -> None:
        """Tell all of an event."""
        record(self.run, event)
        if self.run.has_waiting_lines:
            self._say_once("train.log_waits", path=self.run.events)
        self.trackers.log(event)
        self._say_problem()
        self.screen.show(event, is_logged=event["step"] % self.logging_steps == 0)

    def end(self) -> None:
        """Close the trackers."""
        self.trackers.end()
        self._say_problem()

    def _say_problem(self) -> None:
        problem = self.trackers.problem
        if problem is not None:
            self._say_once("train.tracker_failed", problem=f"{type(problem).__name__}: {problem}")

    def _say_once(self, key: str, **values: Any) -> None:
        if key not in self._said:
            self._said.add(key)
            self.console.say(key, style="yellow", **values)
