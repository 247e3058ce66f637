"""Batches prepared on every core: rendered here and, where the data are large enough, in helper processes as well.

    reader ─┬─ helper: render, encode, finish ──────────────────┐
            ├─ helper: …                                        ├─ in the order of the rows
            └─ here:   render │ encode, in Rust │ finish ───────┘

A helper is this Python again, and talks through its pipes: it ends when they close, so that nothing outlives a process
that is killed; and if it dies itself, what it was given is prepared here.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import IO

from truetune.data.batches import Done, Job, Preparer

MIN_HELPED_BYTES = 4 << 20
"""Data files that are smaller altogether are prepared before a helper has started."""

MAX_HELPERS = 7
PIPE_BYTES = 1 << 20
"""Room for a batch, where the system lets us choose: a process that waits for the other one to read does no work."""

PATIENCE_S = 45.0
"""A helper that takes longer for one batch hangs; what it has is prepared here."""

JOBS_AHEAD = 2
"""Batches that a helper has at a time: one that it works on and one that waits, so that it need not."""


class Crew:
    """This process and its helpers; `with` ends them. `num_bytes`: size of the data, which decides on helpers."""

    def __init__(self, preparer: Preparer, *, num_bytes: int) -> None:
        self._preparer = preparer
        self._encoder = ThreadPoolExecutor(max_workers=1)
        num_helpers = 0 if num_bytes < MIN_HELPED_BYTES else min(_num_cores() - 1, MAX_HELPERS)
        self._helpers: list[_Helper] = []
        # A machine that cannot start one more process does without it.
        with contextlib.suppress(OSError):
            for _ in range(num_helpers):
                self._helpers.append(_Helper(preparer))

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for helper in self._helpers:
            helper.close()
        self._encoder.shutdown(cancel_futures=True)

    def prepare(self, jobs: Iterable[Job]) -> Generator[Done, None, None]:
        """Yield the batches of jobs, prepared, in order."""
        underway: deque[Callable[[], Done]] = deque()
        with _rare_collections():
            for job in jobs:
                underway.append(self._begin(job))
                if len(underway) > JOBS_AHEAD * (1 + len(self._helpers)):
                    yield underway.popleft()()
            while underway:
                yield underway.popleft()()

    def _begin(self, job: Job) -> Callable[[], Done]:
        """Give a batch to whoever is free; what is returned waits for it to be done."""
        for helper in self._helpers:
            if helper.has_room:
                return partial(self._end, helper, helper.send(job), job=job)
        rendered = self._preparer.render(job)
        tokens = self._encoder.submit(self._preparer.renderer.encode, rendered.texts)
        return lambda: self._preparer.finish(rendered, tokens.result())

    def _end(self, helper: _Helper, answer: Future[Done | None], *, job: Job) -> Done:
        try:
            done = answer.result(timeout=PATIENCE_S)
        except (TimeoutError, CancelledError):
            helper.close()
            done = None
        return done or self._preparer.run(job)


class _Helper:
    """One helper process, and the thread that hears its answers."""

    def __init__(self, preparer: Preparer) -> None:
        # Modules are found where this Python finds them.
        program = f"import sys; sys.path[:] = {sys.path!r}; from truetune.data.crew import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Its faults are not shown: whatever they are, the batch is prepared here, and they come up again.
            stderr=subprocess.DEVNULL,
            pipesize=PIPE_BYTES,
        )
        self._to: IO[bytes] = self._process.stdin  # type: ignore[assignment]
        self._from: IO[bytes] = self._process.stdout  # type: ignore[assignment]
        self._listener = ThreadPoolExecutor(max_workers=1)
        self._answers: list[Future[Done | None]] = []
        self._is_dead = False
        # The tokenizer has some megabytes, which it reads when it has started.
        self._start = self._listener.submit(self._tell, preparer)

    @property
    def has_room(self) -> bool:
        """Whether it can be given a batch."""
        self._answers = [answer for answer in self._answers if not answer.done()]
        return self._start.done() and not self._is_dead and len(self._answers) < JOBS_AHEAD

    def send(self, job: Job) -> Future[Done | None]:
        """Give it a batch; the future holds None if the helper could not do it."""
        self._tell(job)
        answer = self._listener.submit(self._listen)
        self._answers.append(answer)
        return answer

    def close(self) -> None:
        """End the process; it holds nothing that would be lost."""
        self._is_dead = True
        self._process.kill()
        self._listener.shutdown(cancel_futures=True)
        for pipe in (self._to, self._from):
            # What waits in a broken pipe cannot be flushed.
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.wait()

    def _tell(self, message: Preparer | Job) -> None:
        try:
            pickle.dump(message, self._to, pickle.HIGHEST_PROTOCOL)
            self._to.flush()
        except (OSError, pickle.PicklingError, TypeError, AttributeError):
            self._is_dead = True

    def _listen(self) -> Done | None:
        if self._is_dead:
            return None
        try:
            done: Done = pickle.load(self._from)
        except (OSError, EOFError, pickle.UnpicklingError):
            self._is_dead = True
            return None
        return done


def serve() -> None:
    """Be a helper: read a Preparer, then jobs, and write what is done, until there are no more."""
    # Ctrl-C is for the process that started this one. What others print must not come between the answers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with contextlib.suppress(EOFError, BrokenPipeError), _rare_collections():
        preparer: Preparer = pickle.load(sys.stdin.buffer)
        while True:
            job: Job = pickle.load(sys.stdin.buffer)
            pickle.dump(preparer.run(job), answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Look for garbage in cycles less often: a batch makes many objects and hardly a cycle, and looking took 6 %."""
    before = gc.get_threshold()
    gc.set_threshold(10_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
