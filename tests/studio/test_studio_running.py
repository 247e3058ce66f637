"""The port: one's own, or the first that is free; and a studio that ends when it is told to."""

from __future__ import annotations

import signal
import socket
from typing import Any

import pytest

from truetune.errors import MachineError
from truetune.studio import running
from truetune.studio.running import bind_free


def test_a_free_port_if_the_usual_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        monkeypatch.setattr(running, "PORT", number)
        with bind_free("127.0.0.1", None) as bound:
            assert number < bound.getsockname()[1] <= number + running.NUM_PORTS
        # The one that was asked for is taken or it is a fault.
        with pytest.raises(MachineError):
            bind_free("127.0.0.1", number)
        monkeypatch.setattr(running, "NUM_PORTS", 1)
        with pytest.raises(MachineError):
            bind_free("127.0.0.1", None)


def test_it_ends_with_the_signals_exit_code(process: Any) -> None:
    page = process.start()
    with page.client.stream("GET", f"{page.url}api/state"):
        process.child.send_signal(signal.SIGTERM)
        assert process.child.wait(15) == 143
    log = process.log.read_text()
    assert str(process.port) in log
    assert "Traceback" not in log
