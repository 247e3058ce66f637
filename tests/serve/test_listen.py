"""A socket before anything is loaded, and a server that knows which signal ended it."""

from __future__ import annotations

import signal

import pytest

from truetune.errors import MachineError, UserError
from truetune.serve.listen import Listener, bind


def test_faults_of_an_address() -> None:
    with bind("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        with pytest.raises(MachineError) as caught:
            bind("127.0.0.1", port)
        assert caught.value.key == "port_in_use"
    bind("127.0.0.1", port).close()
    for host in ("no such host", "192.0.2.1"):
        with pytest.raises(UserError):
            bind(host, 0)


def test_the_first_signal_is_the_one_that_counts() -> None:
    listener = Listener(None, on_ready=lambda: None, shutdown_s=1)
    assert listener.exit_code == 0
    listener.handle_exit(signal.SIGTERM, None)
    listener.handle_exit(signal.SIGINT, None)
    assert listener.exit_code == 143
    assert listener.should_exit
