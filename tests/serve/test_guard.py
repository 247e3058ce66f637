"""Who may ask, and how much: S2, S3, S6 and S8, against a real server."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from truetune.errors import UserError
from truetune.serve import guard
from truetune.serve.guard import MAX_BODY_BYTES, is_loopback, read_token

TOKEN = "k3y-" + "x" * 40
ASK = {"model": "one", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def closed(start: Callable[..., Any], served: Any) -> Any:
    """A server that asks for a token."""
    return start(token=TOKEN, service=served.service)


def memory_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def send(served: Any, *parts: bytes, pause_s: float = 0.0) -> tuple[bytes, float]:
    """What comes back until the server closes, and how long that took; `parts` are sent with pauses."""
    began, received = time.perf_counter(), b""
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        # The server may close while there is more to send.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause_s)
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                received += piece
    return received, time.perf_counter() - began


def test_s02_large_bodies(served: Any) -> None:
    """By their length, and in chunks without end; memory stays as it is."""
    before = memory_bytes()
    huge = HEAD + b"content-length: 1000000000\r\n\r\n"
    assert send(served, huge)[0].startswith(b"HTTP/1.1 413 ")
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    answer, _ = send(served, HEAD + b"transfer-encoding: chunked\r\n\r\n", *[chunk] * 2000)
    assert answer.startswith(b"HTTP/1.1 413 ") or answer == b""
    body = json.dumps(ASK | {"user": "x" * MAX_BODY_BYTES}).encode()
    response = httpx.post(f"{served.url}/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_large"
    assert memory_bytes() - before < 50e6
    assert served.post().status_code == 200


def test_s03_slow_clients(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers and bodies have their time; nobody else waits meanwhile."""
    monkeypatch.setattr(guard, "HEADERS_S", 0.3)
    monkeypatch.setattr(guard, "BODY_S", 0.3)
    for parts in ([b""], [HEAD[:20]], [bytes([byte]) for byte in HEAD]):
        answer, duration = send(served, *parts, pause_s=0.02)
        assert answer.startswith(b"HTTP/1.1 408 "), parts
        assert duration < 3
    body = json.dumps(ASK).encode()
    slow = [HEAD + f"content-length: {len(body)}\r\n\r\n".encode(), *(bytes([byte]) for byte in body)]
    answer, duration = send(served, *slow, pause_s=0.02)
    assert answer.startswith(b"HTTP/1.1 408 ")
    # A second request on the same connection has the same time.
    get = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    answer, duration = send(served, get, HEAD[:10], pause_s=0.05)
    assert b"200 OK" in answer
    assert answer.rstrip().endswith(b"content-length: 0")
    assert b"408 Request Timeout" in answer
    assert served.post().status_code == 200


@pytest.mark.slow
def test_s03_a_client_that_does_not_read(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row is free when its answer is made, and its connection ends when nothing more fits into it."""
    monkeypatch.setattr(guard, "SEND_S", 0.3)
    body = json.dumps(ASK | {"max_tokens": 2000, "n": 8, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        while not served.service.worker.num_running:
            time.sleep(0.01)
        assert served.idle(30) < 30


def test_s06_tokens(served: Any, closed: Any) -> None:
    """Only the whole token, in its header; it stands in no log."""
    ask = {"url": f"{closed.url}/chat/completions", "json": ASK}
    wrong: list[dict[str, str]] = [
        {},
        *(
            {"authorization": value}
            for value in ("", "Bearer", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", TOKEN, f"Basic {TOKEN}")
        ),
        {"authorization": f"Bearer {TOKEN.upper()}"},
        {"x-api-key": TOKEN},
        {"cookie": f"token={TOKEN}"},
    ]
    for headers in wrong:
        response = httpx.post(**ask, headers=headers)
        assert response.status_code == 401, headers
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert httpx.post(**ask, params={"token": TOKEN, "api_key": TOKEN}).status_code == 401
    for path in ("/v1/models", "/metrics", "/nothing", "/health/"):
        assert httpx.get(closed.url.removesuffix("/v1") + path).status_code == 401
    right = {"authorization": f"Bearer {TOKEN}"}
    assert httpx.post(**ask, headers=right).status_code == 200
    assert httpx.get(closed.url.removesuffix("/v1") + "/health").status_code == 200
    # A name of the machine is fine where the token proves who asks.
    assert httpx.post(**ask, headers=right | {"host": "my-machine"}).status_code == 200
    assert served.logs[-1]["status"] == 200
    assert TOKEN not in str(served.logs)


def test_s08_other_sites(served: Any, closed: Any) -> None:
    """A foreign Host (DNS rebinding), a page of another site, a preflight; no header invites one."""
    ask = {"url": f"{served.url}/chat/completions", "json": ASK}
    for host in ("evil.example", f"evil.example:{served.port}", "127.0.0.1.evil.example", "localhost.evil", "[bad", ""):
        response = httpx.post(**ask, headers={"host": host})
        assert response.status_code in (400, 403), host
        assert response.status_code == 403 or host == ""
    for host in ("localhost", f"LOCALHOST:{served.port}", "127.0.0.1:9", "[::1]:80"):
        assert httpx.post(**ask, headers={"host": host}).status_code == 200
    own = {"host": f"localhost:{served.port}"}
    origins = ("https://evil.example", "null", "http://localhost:1", f"http://localhost:{served.port}.evil.example")
    for origin in origins:
        assert httpx.post(**ask, headers=own | {"origin": origin}).status_code == 403
        asked = {"origin": origin, "access-control-request-method": "POST"}
        preflight = httpx.options(ask["url"], headers=own | asked)
        assert preflight.status_code == 403
        assert not [name for name in preflight.headers if name.startswith("access-control")]
    assert httpx.post(**ask, headers=own | {"origin": f"http://localhost:{served.port}"}).status_code == 200
    bearing = {"authorization": f"Bearer {TOKEN}", "origin": "https://evil.example"}
    assert httpx.get(f"{closed.url}/models", headers=bearing).status_code == 403


def test_token_files(tmp_path: Path) -> None:
    """Made with 256 random bits for its owner alone; refused where others can read it or it is short."""
    os.umask(before := os.umask(0))
    os.umask(0)
    try:
        token = read_token(tmp_path / "a" / "token")
    finally:
        os.umask(before)
    path = tmp_path / "a" / "token"
    assert len(token) >= 43
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_token(path) == token
    assert read_token(tmp_path / "other") != token
    path.chmod(0o640)
    with pytest.raises(UserError) as caught:
        read_token(path)
    assert caught.value.key == "token_open"
    for weak in ("short", "x" * 20 + " " + "y" * 20, ""):
        path.write_text(weak)
        path.chmod(0o600)
        with pytest.raises(UserError) as caught:
            read_token(path)
        assert caught.value.key == "token_weak"


def test_addresses() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "192.168.0.2", "::")] == [
        *[True] * 3,
        *[False] * 3,
    ]
