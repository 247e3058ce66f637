"""From folders to a page that answers, and its end."""

from __future__ import annotations

import socket
from collections.abc import Callable

from truetune.config import cache_dir
from truetune.errors import MachineError
from truetune.serve.guard import read_token
from truetune.serve.listen import Listener, bind
from truetune.studio.app import Studio, create_app
from truetune.studio.door import Door
from truetune.studio.places import Places

PORT, NUM_PORTS = 7860, 50
SHUTDOWN_S = 1
"""Streams never end by themselves; the page connects again by itself, too."""


class Server(Listener):
    """Listens for a studio, and ends the server that it talks to when it ends."""

    def __init__(self, studio: Studio, *, token: str | None, on_ready: Callable[[], None]) -> None:
        secret = read_token(cache_dir() / "studio-cookie")
        door = Door(create_app(studio), secret=secret, token=token, lang=studio.lang)
        super().__init__(door, on_ready=on_ready, shutdown_s=SHUTDOWN_S)
        self._studio = studio

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the connections, then the server of the talk; jobs go on."""
        await super().shutdown(sockets)
        await self._studio.talk.close()


def bind_free(host: str, port: int | None) -> socket.socket:
    """Return a socket bound to a port; without one, to PORT or the first free one after it.

    Raises: MachineError if the port is in use, UserError if there is no such address.
    """
    if port is not None:
        return bind(host, port)
    for number in range(PORT, PORT + NUM_PORTS):
        try:
            return bind(host, number)
        except MachineError:
            continue
    return bind(host, PORT)


def run(places: Places, *, bound: socket.socket, token: str | None, lang: str, on_ready: Callable[[], None]) -> int:
    """Answer until a signal; return the exit code that it means."""
    server = Server(Studio(places, lang), token=token, on_ready=on_ready)
    server.run(sockets=[bound])
    return server.exit_code
