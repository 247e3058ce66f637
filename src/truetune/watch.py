"""Sees the events of a run as they come: which step is best, when it is enough, and what is likely to be wrong."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

Event = dict[str, Any]

NUM_ZEROS = 3
"""Losses of exactly zero in a row that are spoken of."""

NUM_FLAT, FLAT_SHARE = 30, 0.01
"""Steps after which the loss should have fallen by this share of itself."""

NUM_RISING = 2
"""Evaluations in a row above the best one that are spoken of."""


class Watch:
    """What the events so far say. All of it follows from them, so that a resumed run sees the same.

    `best_step`, `best_loss`: of the lowest held-out loss after step 0. `is_over`: no better one for `patience`
    evaluations. `wants_save`: the state is worth a checkpoint; set back by `saved`.
    """

    def __init__(self, *, patience: int | None = None, keeps_best: bool = False) -> None:
        self.best_step: int | None = None
        self.best_loss = float("inf")
        self.is_over = False
        self.wants_save = False
        self._patience, self._keeps_best = patience, keeps_best
        self._num_worse = 0
        self._num_zeros = 0
        self._losses: list[float] = []
        self._said: set[str] = set()

    def replay(self, events: Iterable[Event]) -> None:
        """See the events of a run that goes on; what they had to say was said then."""
        for event in events:
            list(self.see(event))
        self.saved()

    def see(self, event: Event) -> Iterator[Event]:
        """Take an event in and yield what there is to say of it: a "finding", each once in a run."""
        found = self._see_eval(event) if event["kind"] == "eval" else self._see_step(event)
        for name, values in found:
            if name not in self._said:
                self._said.add(name)
                self.wants_save = True
                yield {"kind": "finding", "step": event["step"], "name": name, **values}

    def saved(self) -> None:
        """Note that a checkpoint was written."""
        self.wants_save = False

    def _see_eval(self, event: Event) -> Iterator[tuple[str, dict[str, Any]]]:
        if event["step"] == 0:
            return
        if event["eval_loss"] < self.best_loss:
            self.best_loss, self.best_step, self._num_worse = event["eval_loss"], event["step"], 0
            self.wants_save |= self._keeps_best
            return
        self._num_worse += 1
        self.is_over = self._patience is not None and self._num_worse >= self._patience
        if self._num_worse >= NUM_RISING:
            yield "eval_rising", {"best_step": self.best_step, "best_loss": self.best_loss}

    def _see_step(self, event: Event) -> Iterator[tuple[str, dict[str, Any]]]:
        if event["kind"] != "step":
            return
        self._num_zeros = self._num_zeros + 1 if event["loss"] == 0 else 0
        if self._num_zeros >= NUM_ZEROS:
            yield "loss_zero", {}
        if len(self._losses) < NUM_FLAT:
            self._losses.append(event["loss"])
            third = NUM_FLAT // 3
            if len(self._losses) == NUM_FLAT:
                first, last = (statistics.fmean(part) for part in (self._losses[:third], self._losses[-third:]))
                if last > first * (1 - FLAT_SHARE):
                    yield "loss_flat", {"first": first, "last": last}
