"""The steps of a run: yields an event for each thing that happened, and writes nothing itself."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch

from truetune.cores import aside
from truetune.engine.deal import filled
from truetune.engine.master import gradient_norm, optimised
from truetune.engine.objective import Imitation, Objective, Share, StepResult, train_step
from truetune.engine.order import Mix, batches
from truetune.engine.step import Engine, Forward
from truetune.engine.trie import count_trie_tokens
from truetune.errors import NumericsError, out_of_memory
from truetune.ranks import ALONE, Ranks, watched
from truetune.records import Row, RowStream
from truetune.signals import CAUGHT

Event = dict[str, Any]
"""One line of events.jsonl: `kind` and what belongs to it."""

HeldOut = Mapping[str, float] | float | None
"""What is said of held-out rows: their loss, or `eval_loss` and other values by their names; None: there are none."""


@dataclass(frozen=True)
class Plan:
    """The numbers of a run that the loop needs. All steps are optimizer steps.

    `max_skipped`: steps of the run whose loss or gradient may be not finite; they change nothing. `is_streamed`: rows
    are told by their places, too, since a number alone leads to nothing that is kept.
    """

    num_steps: int
    batch_size: int
    seed: int
    max_grad_norm: float
    eval_steps: int
    save_steps: int
    mix: Mix | None = None
    max_skipped: int = 0
    is_streamed: bool = False


@dataclass(frozen=True)
class Batch:
    """The rows of one step, and what this rank computes of it. `epoch`: how many are done after it."""

    step: int
    epoch: float
    rows: Sequence[Row]
    forwards: Sequence[Forward]
    share: Share
    trie_tokens: int


@dataclass
class Loop:
    """Engine, optimizer and scheduler of a run. `backward` adds the gradient (accelerate's); `objective`: its loss.

    `raised`: the signal that this process got, if any. Each of `ranks` runs the same loop: they share a step's rows,
    and end after the same step.
    """

    engine: Engine
    optimizer: torch.optim.Optimizer
    scheduler: Any
    plan: Plan
    backward: Callable[[torch.Tensor], None]
    num_skipped: int = 0
    ranks: Ranks = ALONE
    raised: Callable[[], int | None] = lambda: None
    objective: Objective = field(default_factory=Imitation)
    _agreed: int | None = None

    @property
    def signal(self) -> int | None:
        """The signal that ends the run; of several ranks, what any of them had got when the last step was summed."""
        return self.raised() if self.ranks.size == 1 else self._agreed

    def run(
        self,
        rows: Sequence[Row] | RowStream,
        *,
        start: int = 0,
        evaluate: Callable[[], HeldOut] = lambda: None,
        save: Callable[[int], None] = lambda _step: None,
        should_save: Callable[[], bool] = lambda: False,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Event]:
        """Train from step `start` + 1 to the last, yielding "eval", "step" and "skipped" events.

        `evaluate`: returns what is said of held-out rows, or None where nothing is held out. `save`: writes a
        checkpoint: every `save_steps`, and where `should_save` says so. `should_stop`: asked after each step, and after
        its save; if it says yes, the state is saved and the loop ends.
        """
        plan = self.plan
        if start == 0:
            yield from _evaluation(0, evaluate)
        self.engine.model.train()
        for batch in self._batches(rows, start):
            step = batch.step
            yield from self._step(batch)
            is_last = step == plan.num_steps
            if is_last or step % plan.eval_steps == 0:
                yield from _evaluation(step, evaluate)
            is_stopped = should_stop()
            is_saved = is_last or is_stopped or step % plan.save_steps == 0 or should_save()
            if is_saved:
                save(step)
            # Asked again: a signal may have come while the state was saved, which need not be done twice.
            if is_stopped or (is_saved and should_stop()):
                return

    def _batches(self, rows: Sequence[Row] | RowStream, start: int) -> Iterator[Batch]:
        """Yield the batches from step `start` + 1 on; while one is computed, a thread builds the next one's tries."""
        plan = self.plan
        order = _rows_of_steps(rows, plan, start)

        def build(step: int) -> Batch:
            epoch, chosen = next(order)
            share = Share(self.objective.measure(chosen), self.ranks.rank, self.ranks.size)
            forwards = self.objective.forwards(self.engine, chosen, share=share)
            return Batch(step, epoch, chosen, forwards, share, count_trie_tokens(self.objective.pairs(chosen)))

        with closing(order), aside() as builder:
            following = builder.submit(build, start + 1)
            for step in range(start + 1, plan.num_steps + 1):
                batch = following.result()
                if step < plan.num_steps:
                    following = builder.submit(build, step + 1)
                yield batch

    def _step(self, batch: Batch) -> Iterator[Event]:
        """Take one optimizer step and yield its event; before it, one for each time that memory ran out."""
        began, cpu_began = time.perf_counter(), time.process_time()
        step, rows = batch.step, batch.rows
        # Once, however often memory runs out: all ranks ask together.
        share = self.objective.settle(self.engine, batch.share, total=self.ranks.sum)
        while True:
            try:
                result = self._own_part(batch, share)
                break
            except (MemoryError, RuntimeError) as error:
                # The other ranks of a sharded base wait for this forward, and would not know of another try.
                if not is_out_of_memory(error) or self.engine.is_sharded:
                    raise
                # What was added to the gradient is half a step.
                self.optimizer.zero_grad(set_to_none=True)
            batch = self._in_smaller_forwards(batch)
            yield {"kind": "memory", "step": step, "max_tokens": self.engine.max_tokens}
        result = self._together(result)
        learning_rate, *others = self.scheduler.get_last_lr()
        grad_norm = self._clipped(step, rows, result.loss)
        told: Event = {"step": step, "row_ids": [row.index for row in rows]}
        if self.plan.is_streamed:
            told["row_places"] = [row.where for row in rows]
        if not (math.isfinite(result.loss) and math.isfinite(grad_norm)):
            self._skip()
            yield {"kind": "skipped", **told, "loss": str(result.loss), "grad_norm": str(grad_norm)}
            return
        self._update()
        seconds = time.perf_counter() - began
        yield {
            "kind": "step",
            **told,
            "epoch": round(batch.epoch, 4),
            "loss": result.loss,
            **result.told,
            "learning_rate": learning_rate,
            # B's, where LoRA+ gives it one of its own.
            **({"learning_rate_b": others[-1]} if others else {}),
            "grad_norm": grad_norm,
            "rows": len(rows),
            "pairs": len(self.objective.pairs(rows)),
            "learned_tokens": result.num_learned_tokens,
            "trie_tokens": batch.trie_tokens,
            "computed_tokens": result.num_tokens,
            "seconds": seconds,
            "memory_bytes": _memory_bytes(),
            "cpu_percent": round(100 * (time.process_time() - cpu_began) / seconds, 1),
            "gpu_percent": _gpu_percent(),
        }

    def _own_part(self, batch: Batch, share: Share) -> StepResult:
        """Add the gradient of this rank's part of a step."""
        forwards = batch.forwards
        if self.engine.is_sharded:
            forwards = filled(self.engine, forwards, num_forwards=int(self.ranks.most(len(forwards))))
        with watched():
            return train_step(
                self.engine,
                forwards,
                seeds=(self.plan.seed, batch.step),
                backward=self.backward,
                objective=self.objective,
                share=share,
            )

    def _together(self, part: StepResult) -> StepResult:
        """Sum the ranks' gradients, losses and signals, all in one reduction, and return the whole step's result."""
        raised = self.raised()
        flags = [float(raised == number) for number in CAUGHT]
        numbers = [part.loss, part.num_learned_tokens, part.num_tokens, *flags, *part.told.values()]
        loss, learned, tokens, *others = self.ranks.sum_gradients(optimised(self.optimizer), numbers)
        flags, told = others[: len(flags)], dict(zip(part.told, others[len(flags) :], strict=True))
        self._agreed = next((int(number) for number, flag in zip(CAUGHT, flags, strict=True) if flag), None)
        return StepResult(loss, int(learned), int(tokens), told)

    def _in_smaller_forwards(self, batch: Batch) -> Batch:
        """Halve the forwards of a batch that did not fit, and of all that follow.

        Raises: MachineError if its longest pair, or its largest preference row, alone does not fit.
        """
        largest = max(forward.num_tokens for forward in batch.forwards)
        least = max(forward.least_tokens for forward in batch.forwards)
        if largest <= least:
            raise out_of_memory(f"step {batch.step}")
        size = min(self.engine.max_tokens, max(largest // 2, least))
        self.engine = replace(self.engine, max_tokens=size)
        return replace(batch, forwards=self.objective.forwards(self.engine, batch.rows, share=batch.share))

    def _clipped(self, step: int, rows: Sequence[Row], loss: float) -> float:
        """Clip the gradient and return its norm before that.

        Raises: NumericsError before the optimizer moves, if the loss or the gradient is not finite and no more steps
        may be skipped: one NaN would make every weight NaN (torch's clip_grad_norm_ spreads it, AdamW keeps it).
        """
        weights = optimised(self.optimizer)
        norm = gradient_norm(weights)
        torch.nn.utils.clip_grads_with_norm_(weights, self.plan.max_grad_norm, norm)
        grad_norm = float(norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)) and self.num_skipped >= self.plan.max_skipped:
            self.optimizer.zero_grad(set_to_none=True)
            origins = ", ".join(f"{row.where} (row {row.index})" for row in rows)
            raise NumericsError(
                "not_finite", where=f"step {step}", fix="not_finite", loss=loss, grad_norm=grad_norm, rows=origins
            )
        return grad_norm

    def _update(self) -> None:
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _skip(self) -> None:
        """Leave weights and moments as they are; the learning rate goes on, since it belongs to the step's number."""
        self.num_skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            # torch warns if the first step of all is skipped.
            warnings.simplefilter("ignore", UserWarning)
            self.scheduler.step()


def _rows_of_steps(
    rows: Sequence[Row] | RowStream, plan: Plan, start: int
) -> Generator[tuple[float, Sequence[Row]], None, None]:
    """Yield (epochs done, rows) of each step after `start`."""
    if isinstance(rows, RowStream):
        yield from rows.steps(start, batch_size=plan.batch_size)
        return
    for epoch, numbers in batches(len(rows), plan.batch_size, seed=plan.seed, start=start, mix=plan.mix):
        yield epoch, [rows[number] for number in numbers]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: a GPU's, or the system's, which torch calls a RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _evaluation(step: int, evaluate: Callable[[], HeldOut]) -> Iterator[Event]:
    began = time.perf_counter()
    found = evaluate()
    if found is None:
        return
    values = found if isinstance(found, Mapping) else {"eval_loss": found}
    loss = values["eval_loss"]
    if not math.isfinite(loss):
        raise NumericsError("held_out_not_finite", where=f"step {step}", fix="held_out_not_finite", loss=loss)
    yield {"kind": "eval", "step": step, **values, "seconds": time.perf_counter() - began}


def _memory_bytes() -> int:
    """Return this process's resident set; with a GPU, the most that was allocated on it so far."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


def _gpu_percent() -> float | None:
    """Return the GPU's utilisation, None without one or without NVML."""
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml

        return float(torch.cuda.utilization())
    except ModuleNotFoundError:
        return None
    except (RuntimeError, pynvml.NVMLError):
        # MIG slices and some virtual machines do not say.
        return None
