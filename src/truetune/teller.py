"""Hands each event of a run to the run's files, the trackers and the screen; none of the last two can end a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from truetune import trackers
from truetune.console import Console, Steps
from truetune.output import record
from truetune.rundir import RunDir


@dataclass
class Teller:
    """Who is told. `logging_steps`: how often the trackers and a screen without a bar are told of a step."""

    run: RunDir
    accelerator: Any
    console: Console
    screen: Steps
    logging_steps: int
    _said: set[str] = field(default_factory=set)

    def tell(self, event: dict[str, Any]) -> None:
        """Tell all of an event."""
        record(self.run, event)
        if self.run.has_waiting_lines:
            self._say_once("train.log_waits", path=self.run.events)
        self._note(trackers.log(self.accelerator, event, every=self.logging_steps))
        self.screen.show(event, is_logged=event["step"] % self.logging_steps == 0)

    def end(self) -> None:
        """Close the trackers."""
        self._note(trackers.end(self.accelerator))

    def _note(self, problem: Exception | None) -> None:
        if problem is not None:
            self._say_once("train.tracker_failed", problem=f"{type(problem).__name__}: {problem}")

    def _say_once(self, key: str, **values: Any) -> None:
        if key not in self._said:
            self._said.add(key)
            self.console.say(key, style="yellow", **values)
