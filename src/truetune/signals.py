"""SIGINT, SIGTERM, SIGHUP: the first one lets the step finish and the state be saved, the second one ends at once."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def limited(seconds: float, error: Exception) -> Iterator[None]:
    """End the block with `error` after some time, in any thread; only between two steps of Python, not inside C."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        with _limited_by_timer(seconds, error):
            yield
        return

    def stop(*_: Any) -> None:
        raise error

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _TimeOver(BaseException):
    """Raised inside a block by another thread; no handler for Exception in the block keeps it."""


@contextmanager
def _limited_by_timer(seconds: float, error: Exception) -> Iterator[None]:
    """The same where no signal comes: another thread has Python raise in this one (PyThreadState_SetAsyncExc)."""
    thread, lock, is_done = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False

    def stop() -> None:
        with lock:
            if not is_done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_TimeOver))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            with lock:
                is_done = True
            timer.cancel()
            # What was set at the last moment is not raised later.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
    except _TimeOver:
        raise error from None


class StopFlag:
    """While it is entered, remembers the first signal in `signal`; the default handling is back for the second."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in CAUGHT:
                # Under nohup a closed terminal is to be ignored.
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
