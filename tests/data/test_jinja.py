"""The time limit of templates; clocks and our own templates are met in test_template.py."""

from __future__ import annotations

import threading
import time

import pytest

from truetune.data.jinja import TEMPLATES, limited


def test_a_loop_is_ended() -> None:
    def loop() -> None:
        with limited(0.05):
            while True:
                time.sleep(0.01)

    with pytest.raises(ValueError, match="not done"):
        loop()


def test_what_is_in_time_is_left_alone() -> None:
    with limited(0.05):
        pass
    time.sleep(0.1)
    assert set(TEMPLATES) == {"chatml", "instruction-response"}


def test_another_thread_has_no_limit() -> None:
    done = []

    def work() -> None:
        with limited(0.01):
            time.sleep(0.05)
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]
