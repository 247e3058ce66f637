"""The one thread that owns the model: takes jobs from a bounded queue, answers all of them together, frees their rows.

server threads ── submit, cancel ──▶ waiting ──▶ rows of a batch (one batch for each adapter) ──▶ emit(Piece)
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from truetune.cores import give_back_workers
from truetune.engine.memory import give_back_freed
from truetune.serve.batch import Batch, Row
from truetune.serve.sampler import Draw, Scored
from truetune.serve.text import Detokeniser, StopFinder

PIECE_S = 0.25
"""Time that a piece of new prompts may take: so long others wait for their next token, and a cancelled row stays."""
FIRST_PIECE_TOKENS, LEAST_PIECE_TOKENS, MOST_PIECE_TOKENS = 64, 32, 8192
STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class Piece:
    """What a token added. `finish`: why it was the last one. `problem`: why there is no more, if something failed."""

    text: str = ""
    scored: tuple[Scored, ...] = ()
    num_tokens: int = 0
    finish: str | None = None
    problem: str | None = None


@dataclass(eq=False)
class Job:
    """One answer to be made. `adapter`: its name, None for the base. `emit`: called for each piece, by the worker."""

    adapter: str | None
    prompt_ids: list[int]
    max_tokens: int
    draw: Draw
    stop_ids: frozenset[int]
    stops: Sequence[str]
    tokenizer: Any
    emit: Callable[[Piece], None]
    is_cancelled: bool = False
    num_tokens: int = 0
    row: Row | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.words, self.finder = Detokeniser(self.tokenizer), StopFinder(self.stops)


class Full(Exception):
    """The queue has no room for more jobs."""


class Worker:
    """Runs jobs until it is closed. `batch_for`: makes the batch of an adapter and `select` makes the adapter active.

    `max_rows`: answers made at once. `max_waiting`: jobs that may wait. `max_cached_tokens`: room for keys and values.
    """

    def __init__(
        self,
        forward_model: Any,
        *,
        select: Callable[[str | None], None],
        max_rows: int,
        max_waiting: int,
        max_cached_tokens: int,
        is_reusing: bool = True,
    ) -> None:
        self._model, self._select = forward_model, select
        self._max_rows, self._max_waiting, self._max_cached_tokens = max_rows, max_waiting, max_cached_tokens
        self._is_reusing = is_reusing
        self._waiting: deque[Job] = deque()
        self._running: dict[Row, Job] = {}
        self._batches: dict[str | None, Batch] = {}
        self._piece_tokens = FIRST_PIECE_TOKENS
        self._changed = threading.Condition()
        self._is_closing = False
        self._problem = ""
        self.counts: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    @property
    def num_waiting(self) -> int:
        """Jobs that no row was free for."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Jobs that have a row."""
        return len(self._running)

    @property
    def is_full(self) -> bool:
        """True if no job would be taken."""
        return self._is_closing or len(self._waiting) >= self._max_waiting

    def start(self) -> None:
        """Start the thread; the calling one, which may have loaded the model, leaves it all cores."""
        give_back_workers()
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait for their rows, all of them or none.

        Raises: Full if there is no room for them.
        """
        with self._changed:
            if self._is_closing or len(self._waiting) + len(jobs) > self._max_waiting:
                raise Full
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody wants these answers any more: their rows are free after the forward that is going on."""
        with self._changed:
            for job in jobs:
                job.is_cancelled = True
            self._changed.notify()

    def close(self, problem: str) -> None:
        """End the thread; jobs that are not done yet end with `problem`."""
        with self._changed:
            self._is_closing = True
            self._problem = problem
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while not self._is_closing:
            try:
                self._turn()
            except Exception as error:
                # Whatever a forward raises (memory, above all) ends the answers that were in it, and not the server.
                self.counts["failed_turns"] += 1
                self._batches = {}
                self._fail_running(f"{type(error).__name__}: {str(error)[:200]}")
        self._fail_running(self._problem)
        for job in self._waiting:
            job.emit(Piece(problem=self._problem))
        self._waiting.clear()

    def _turn(self) -> None:
        if not self._waiting and not self._running:
            # Pieces of prompts have all sizes: ten times 200 requests left 400 MB of freed blocks.
            give_back_freed()
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._is_closing)
            self._drop_cancelled()
            if not self._is_closing:
                self._admit()
        for adapter, batch in list(self._batches.items()):
            if batch.rows and not self._is_closing:
                self._step(adapter, batch)

    def _fail_running(self, problem: str) -> None:
        for job in self._running.values():
            job.emit(Piece(problem=problem))
        self._running = {}

    def _drop_cancelled(self) -> None:
        self.counts["cancelled"] += sum(job.is_cancelled for job in self._waiting)
        self._waiting = deque(job for job in self._waiting if not job.is_cancelled)
        for job in [job for job in self._running.values() if job.is_cancelled]:
            self.counts["cancelled"] += 1
            self._leave(job)

    def _admit(self) -> None:
        """Give rows to those who waited longest, while there are rows and there is room for their tokens."""
        while self._waiting and len(self._running) < self._max_rows:
            job = self._waiting[0]
            num_reserved = len(job.prompt_ids) + job.max_tokens
            batch = self._batches.get(job.adapter) or Batch(self._model, is_reusing=self._is_reusing)
            others = sum(other.num_tokens for other in self._batches.values() if other is not batch)
            needed = others + batch.num_tokens_with(num_reserved)
            if self._running and needed > self._max_cached_tokens:
                return
            if needed > self._max_cached_tokens:
                # Nothing runs: what the other adapters kept is only a reserve.
                self._batches = {}
            self._batches[job.adapter] = batch
            self._waiting.popleft()
            job.row = Row(list(job.prompt_ids), job.draw, num_reserved)
            self._running[job.row] = job
            batch.add(job.row)
            self.counts["prompt_tokens"] += len(job.prompt_ids)
            self.counts["reused_tokens"] += job.row.num_reused

    def _step(self, adapter: str | None, batch: Batch) -> None:
        num_ahead = sum(row.num_ahead for row in batch.rows)
        began = time.perf_counter()
        self._select(adapter)
        found = batch.step(self._piece_tokens)
        self.counts["steps"] += 1
        self._fit_piece(num_ahead, time.perf_counter() - began)
        for row, told in found:
            self._advance(self._running[row], told)

    def _fit_piece(self, num_ahead: int, duration_s: float) -> None:
        """Let the next piece of prompts take about PIECE_S."""
        num_fed = min(num_ahead, self._piece_tokens)
        if num_fed >= LEAST_PIECE_TOKENS:
            wanted = int(num_fed * PIECE_S / duration_s)
            self._piece_tokens = max(LEAST_PIECE_TOKENS, min(wanted, MOST_PIECE_TOKENS, 2 * self._piece_tokens))

    def _advance(self, job: Job, told: Scored | int) -> None:
        """Hand on what a token adds, and end the answer where it ends."""
        token = told if isinstance(told, int) else told.token
        scored = () if isinstance(told, int) else (told,)
        job.num_tokens += 1
        self.counts["answer_tokens"] += 1
        if token in job.stop_ids:
            self._finish(job, job.words.flush(), (), STOP)
            return
        text, is_stopped = job.finder.add(job.words.add(token))
        if is_stopped:
            self._leave(job)
            job.emit(Piece(text, scored, job.num_tokens, STOP))
        elif job.num_tokens >= job.max_tokens:
            self._finish(job, job.words.flush(), scored, LENGTH, text)
        else:
            job.emit(Piece(text, scored, job.num_tokens))

    def _finish(self, job: Job, rest: str, scored: tuple[Scored, ...], finish: str, text: str = "") -> None:
        """End an answer: what waited as the start of a character or of a stop string is text after all."""
        more, is_stopped = job.finder.add(rest)
        self._leave(job)
        text += more + ("" if is_stopped else job.finder.flush())
        job.emit(Piece(text, scored, job.num_tokens, STOP if is_stopped else finish))

    def _leave(self, job: Job) -> None:
        if job.row is not None:
            del self._running[job.row]
            self._batches[job.adapter].remove(job.row)
            job.row = None
