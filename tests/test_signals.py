"""The first signal is remembered, the second one ends the program as it would have."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import pytest

from truetune.signals import CAUGHT, StopFlag, limited


class Recorder:
    """A handler that notes what reaches it."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.seen.append(number)


@pytest.fixture
def before() -> Iterator[Recorder]:
    """Handlers of the test's own, as they were set before the flag is entered."""
    recorder = Recorder()
    old = {number: signal.signal(number, recorder) for number in CAUGHT}
    yield recorder
    for number, handler in old.items():
        signal.signal(number, handler)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in CAUGHT]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_which_signals_are_caught() -> None:
    assert set(CAUGHT) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def test_a_closed_terminal_is_ignored_under_nohup(before: Recorder) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopFlag() as stop:
        send(signal.SIGHUP)
        assert stop.signal is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", CAUGHT)
def test_the_first_signal_is_remembered(number: int, before: Recorder) -> None:
    with StopFlag() as stop:
        assert stop.signal is None
        send(number)
        assert stop.signal == number
    assert before.seen == []


@pytest.mark.parametrize("first", CAUGHT)
@pytest.mark.parametrize("second", CAUGHT)
def test_the_second_signal_gets_the_old_handling(first: int, second: int, before: Recorder) -> None:
    with StopFlag() as stop:
        send(first)
        assert handlers() == [before] * len(CAUGHT)
        send(second)
        assert stop.signal == first
    assert before.seen == [second]


def test_the_second_ctrl_c_interrupts_where_python_would() -> None:
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopFlag() as stop:
            send(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
            assert stop.signal == signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, old)


def test_handlers_are_back_afterwards(before: Recorder) -> None:
    with StopFlag():
        assert before not in handlers()
    assert handlers() == [before] * len(CAUGHT)
    send(signal.SIGTERM)
    assert before.seen == [signal.SIGTERM]


def test_handlers_are_back_after_an_exception(before: Recorder) -> None:
    with pytest.raises(ValueError, match="inside"), StopFlag():
        raise ValueError("inside")
    assert handlers() == [before] * len(CAUGHT)


def test_a_flag_can_be_entered_again(before: Recorder) -> None:
    for _ in range(2):
        with StopFlag() as stop:
            send(signal.SIGINT)
            assert stop.signal == signal.SIGINT
    assert handlers() == [before] * len(CAUGHT)
    assert before.seen == []


def test_in_another_thread_it_changes_nothing(before: Recorder) -> None:
    found: list[object] = []

    def work() -> None:
        with StopFlag() as stop:
            found.extend([stop.signal, *handlers()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None, *[before] * len(CAUGHT)]


# --- a limit of time ---


def test_a_loop_is_ended() -> None:
    def loop() -> None:
        with limited(0.05, ValueError("not done")):
            while True:
                time.sleep(0.01)

    with pytest.raises(ValueError, match="not done"):
        loop()


def test_what_is_in_time_is_left_alone() -> None:
    with limited(0.05, ValueError("not done")):
        pass
    time.sleep(0.1)


@pytest.mark.parametrize("catches", [False, True])
def test_a_limit_in_another_thread(catches: bool) -> None:
    """Where no signal comes, too; a block that catches Exception does not outlive it, and nothing is raised later."""
    found: list[object] = []

    def work() -> None:
        began = time.monotonic()
        try:
            with limited(0.2, TimeoutError("over")):
                while time.monotonic() - began < 5:
                    try:
                        sum(range(1000))
                    except Exception:
                        if not catches:
                            raise
        except TimeoutError as error:
            found.append(error)
        with limited(0.05, TimeoutError("over")):
            found.append("short")
        time.sleep(0.1)
        sum(range(1000))
        found.append(time.monotonic() - began)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert [str(some) for some in found[:2]] == ["over", "short"]
    assert isinstance(found[2], float)
    assert found[2] < 2
