"""Who may ask, and how much: Host, Origin, token, size of the body, time to send it. Before anything else sees it.

A web page that the user has open can send requests to 127.0.0.1, and a foreign name can be made to point there; both
say so in Origin and Host (LLaMA-Factory allowed every origin; Ollama: CVE-2024-28224).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from uvicorn.protocols.http.h11_impl import H11Protocol

from truetune.errors import UserError
from truetune.messages import text
from truetune.serve.schema import Refused

MAX_BODY_BYTES = 1 << 20
MAX_OPEN = 512
"""Requests whose bodies are held at once."""
HEADERS_S, BODY_S, SEND_S = 10.0, 20.0, 30.0
"""Time that a client has for its headers, for its body, and to read what is sent before the next piece fits."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MIN_TOKEN_CHARACTERS = 32
BODY = "truetune.body"

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    return host in LOOPBACK


def read_token(path: Path) -> str:
    """Return the token in a file that only its owner can read; a new one is made where there is none.

    Raises: UserError if others can read it, or it is too short to be a secret.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UserError("token_open", where=str(path), fix="token_open", path=path)
    token = path.read_text(encoding="utf-8").strip()
    if len(token) < MIN_TOKEN_CHARACTERS or not re.fullmatch(r"[!-~]+", token):
        raise UserError("token_weak", where=str(path), fix="token_weak", count=MIN_TOKEN_CHARACTERS)
    return token


class Guard:
    """An ASGI application around another one. `token`: what requests must bear; None: only this machine may ask."""

    def __init__(self, app: Any, *, token: str | None, lang: str) -> None:
        self._app, self._token, self._lang = app, token, lang
        self._num_open = 0

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer a refused request, or hand an allowed one on, its body read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._num_open += 1
        try:
            await self._pass_on(scope, receive, send)
        finally:
            self._num_open -= 1

    async def _pass_on(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        try:
            self._check(scope, headers_of(scope))
            if scope["method"] == "POST":
                if self._num_open > MAX_OPEN:
                    raise Refused("busy", status=429, code="busy")
                scope[BODY] = await read_body(headers_of(scope), receive)
        except Refused as error:
            # What is left of the body is not read: the connection ends.
            await respond(send, error, self._lang, close=True)
            return
        except Gone:
            return

        async def send_in_time(message: dict[str, Any]) -> None:
            async with asyncio.timeout(SEND_S):
                await send(message)

        await self._app(scope, receive, send_in_time)

    def _check(self, scope: dict[str, Any], headers: dict[str, str]) -> None:
        check_place(headers, is_local=self._token is None)
        if self._token is not None and scope["path"] != "/health":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            is_same = hmac.compare_digest(given.strip().encode(), self._token.encode())
            if scheme.lower() != "bearer" or not is_same:
                raise Refused("token", status=401, code="invalid_api_key")


def check_place(headers: dict[str, str], *, is_local: bool) -> None:
    """Raise Refused if another site's page asks, or, with `is_local`, if the name asked for is not this machine's."""
    host = _name(headers.get("host", ""))
    if is_local and host not in LOOPBACK:
        raise Refused("host", status=403, code="host", host=host)
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        raise Refused("origin", status=403, code="origin")


class Gone(Exception):
    """The client left before its body was there."""


def headers_of(scope: dict[str, Any]) -> dict[str, str]:
    """Return the headers of a request, their names in lower case."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _name(host: str) -> str:
    """Return a Host header without its port.

    >>> _name("localhost:8000"), _name("[::1]:8000"), _name("evil.example")
    ('localhost', '::1', 'evil.example')
    """
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def read_body(headers: dict[str, str], receive: Receive, *, kind: str = "application/json") -> bytes:
    """Return the body.

    Raises: Refused if it is too large, too slow or of another kind, Gone if the client left.
    """
    if headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
        raise Refused("content_type", code="content_type")
    too_large = Refused("too_large", status=413, code="too_large", most=MAX_BODY_BYTES)
    if int(headers.get("content-length", "0")) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise Gone
                body += message.get("body", b"")
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise Refused("too_slow", status=408, code="too_slow") from None


def error_object(error: Refused, lang: str) -> dict[str, Any]:
    """Return an error as OpenAI's clients expect it."""
    told = text(f"api.{error.key}", lang, **error.values)
    return {"error": {"message": told, "type": error.type, "param": error.param, "code": error.code}}


async def respond(send: Send, error: Refused, lang: str, *, close: bool = False) -> None:
    """Send an error."""
    body = json.dumps(error_object(error, lang), ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] if close else []
    headers += [(b"retry-after", b"1")] if error.status == 429 else []
    headers += [(b"www-authenticate", b"Bearer")] if error.status == 401 else []
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class TimedProtocol(H11Protocol):
    """uvicorn's protocol with a limit for headers: without, a client that sends a byte a minute stays for ever."""

    _headers_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time for the first headers."""
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        """Stop it where the headers are whole, start it where others begin."""
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_timer()
        super().connection_lost(exc)

    def _watch_headers(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._headers_timer is None:
            self._headers_timer = self.loop.call_later(HEADERS_S, self._close_slow)

    def _stop_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _close_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()
