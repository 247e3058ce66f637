"""Experiment trackers by name, through accelerate: SwanLab and TensorBoard."""

from __future__ import annotations

import importlib.util
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from truetune.config import Config
from truetune.errors import UserError
from truetune.signals import limited

REWARD_KEYS = ("rewards_chosen", "rewards_rejected", "reward_accuracy", "reward_margin")
TRAIN_KEYS = ("loss", "learning_rate", "grad_norm", "memory_bytes", "cpu_percent", "gpu_percent", "epoch")


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError, with the install command, for a tracker whose package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError("extra_missing", where=f"report_to: {name}", fix="extra_missing", extra=name)


class Trackers:
    """Hands events to the trackers from a thread of its own: one that is slow, or cannot be reached, costs no step.

    `every`: how often a step is told. `problem`: what a tracker raised first, None so far.
    """

    def __init__(self, accelerator: Any, *, every: int) -> None:
        self.problem: Exception | None = None
        self._accelerator, self._every = accelerator, every
        self._events: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def log(self, event: Mapping[str, Any]) -> None:
        """Tell an event: each evaluation, and the steps that `every` divides."""
        if event["kind"] == "eval" or (event["kind"] == "step" and event["step"] % self._every == 0):
            self._events.put(event)

    def end(self, *, timeout_s: float = 60.0) -> None:
        """Close the trackers when they have got everything, or give up after some time."""
        late = TimeoutError(f"not done after {timeout_s:.0f} s")
        self._events.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.problem = self.problem or late
            return
        # Here, not in the thread: SwanLab ends in the main thread only.
        with limited(timeout_s, late):
            # Before init_trackers there are none.
            for tracker in getattr(self._accelerator, "trackers", ()):
                # Not end_training, which ends the group of ranks, too (accelerate 1.15, state.py).
                self._try(tracker.finish)

    def _work(self) -> None:
        while (event := self._events.get()) is not None:
            self._try(partial(self._accelerator.log, scalars_of(event), step=event["step"]))

    def _try(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            self.problem = self.problem or error


def start(accelerator: Any, config: Config, *, folder: Path) -> Trackers:
    """Start the trackers that `accelerator` was made with; what they write lies under `folder`.

    Raises: UserError if a tracker refuses its settings or its login.
    """
    scalars = {key: value for key, value in config.model_dump().items() if isinstance(value, str | int | float | bool)}
    name = config.tracker_name or folder.name
    swanlab = {"experiment_name": name, "logdir": str(folder / "swanlab")}
    try:
        accelerator.init_trackers(config.tracker_project, config=scalars, init_kwargs={"swanlab": swanlab})
    except (RuntimeError, ValueError, OSError) as error:
        names = ", ".join(config.report_to)
        raise UserError("tracker_refused", where=f"report_to: {names}", fix="tracker_refused", problem=error) from error
    return Trackers(accelerator, every=config.logging_steps)


def scalars_of(event: Mapping[str, Any]) -> dict[str, float]:
    """Return what trackers get of an event, under the names that Trainer's callbacks use ("train/loss", ...)."""
    if event["kind"] == "eval":
        return {f"eval/{name}": event[f"eval_{name}"] for name in ("loss", *REWARD_KEYS) if f"eval_{name}" in event}
    if event["kind"] != "step":
        return {}
    values = {f"train/{key}": event[key] for key in TRAIN_KEYS if event[key] is not None}
    values |= {f"train/{key}": event[key] for key in REWARD_KEYS if key in event}
    values["train/rows_per_second"] = event["rows"] / event["seconds"]
    values["train/tokens_per_second"] = event["computed_tokens"] / event["seconds"]
    return values
