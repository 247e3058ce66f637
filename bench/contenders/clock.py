"""The clock of the contenders that run on transformers' Trainer."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from bench.recipe import Job


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Records each optimizer step: from its first forward to the end of the update; making batches is not counted."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Before the first forward of a step."""
        self.began = time.perf_counter()

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """After the optimizer's update, which ends the accumulation."""
        self.job.record(state.global_step, time.perf_counter() - self.began)
