"""A socket that is bound before anything is loaded, and a server that knows which signal ended it."""

from __future__ import annotations

import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import uvicorn

from truetune.errors import MachineError, UserError
from truetune.serve.guard import TimedProtocol

BACKLOG = 1024


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound, so that a port in use is found before anything is loaded.

    Raises: MachineError if the port is in use, UserError if there is no such address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as stack:
            bound = stack.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            stack.pop_all()
    except socket.gaierror as error:
        raise UserError("serve_address", where=host, fix="serve_address", problem=error.strerror) from None
    except OSError as error:
        place = f"{host}:{port}"
        if error.errno == errno.EADDRINUSE:
            raise MachineError("port_in_use", where=place, fix="port_other", port=port) from None
        if error.errno == errno.EACCES:
            raise MachineError("port_forbidden", where=place, fix="port_other", port=port) from None
        raise UserError("serve_address", where=host, fix="serve_address", problem=error.strerror) from None
    return bound


class Listener(uvicorn.Server):
    """uvicorn's server around an application. `signal_number`: what ended it. `on_ready`: called when it listens.

    `shutdown_s`: time that running answers have after SIGINT or SIGTERM.
    """

    def __init__(self, app: Any, *, on_ready: Callable[[], None], shutdown_s: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=TimedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                headers=[("X-Content-Type-Options", "nosniff")],
                backlog=BACKLOG,
                timeout_graceful_shutdown=shutdown_s,
            )
        )
        self.signal_number: int | None = None
        self._on_ready = on_ready

    @property
    def exit_code(self) -> int:
        """The exit code that the end means."""
        return 128 + self.signal_number if self.signal_number else 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and tell so."""
        await super().startup(sockets)
        self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Note the signal; uvicorn would raise it again when all is done, and the exit code be another one."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Remember the first signal."""
        self.signal_number = self.signal_number or sig
        super().handle_exit(sig, frame)
