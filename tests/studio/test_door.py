"""S7, S8 and the cookie: what other sites, other names and other programs are told, by a real server."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from truetune.serve.guard import MAX_BODY_BYTES
from truetune.studio.door import HEADERS, POLICY

TOKEN = "s3cret-" + "y" * 40
ROUTES = ["state", "texts", "fields", "files", "jobs", "runs", "runs/one", "rows?store=x", "runs/one/report.html"]


def raw(page: Any, target: str) -> bytes:
    """Ask for a target that no client would send as it is."""
    head = f"GET {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode("latin-1")
    with socket.create_connection(("127.0.0.1", int(page.url.split(":")[2].strip("/"))), timeout=10) as connection:
        connection.sendall(head)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received


@pytest.mark.parametrize("route", ROUTES)
def test_the_api_needs_the_pages_cookie(route: str, page: Any) -> None:
    assert httpx.get(f"{page.url}api/{route}").status_code == 403
    wrong = {"cookie": "truetune=" + "0" * 64}
    assert httpx.get(f"{page.url}api/{route}", headers=wrong).status_code == 403
    assert page.client.get(f"{page.url}api/{route}").status_code in (200, 404)


def test_the_cookie_is_for_this_page_alone(page: Any) -> None:
    cookie = httpx.get(page.url).headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}
    # Again the same: a page that is open goes on when the studio was started anew.
    assert httpx.get(page.url).headers["set-cookie"] == cookie


def test_s08_other_names_and_other_sites(page: Any) -> None:
    cookies = {"cookie": "; ".join(f"{name}={value}" for name, value in page.client.cookies.items())}
    refused = [
        {"host": "evil.example"},
        {"host": "evil.example:7860"},
        {"host": "127.0.0.1.evil.example"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ]
    for headers in refused:
        for method, path in (("GET", "api/state"), ("POST", "api/jobs"), ("POST", "api/files?name=x")):
            response = httpx.request(method, page.url + path, headers=cookies | headers)
            assert response.status_code == 403, headers
            assert "access-control-allow-origin" not in response.headers
    assert httpx.get(f"{page.url}api/state", headers=cookies).status_code == 200
    own = page.url.rstrip("/")
    assert httpx.get(f"{page.url}api/state", headers=cookies | {"origin": own}).status_code == 200
    # A form of another site can send no JSON, and a preflight is not answered.
    form = {"content-type": "text/plain"}
    assert httpx.post(f"{page.url}api/jobs", headers=cookies | form, content="{}").status_code == 400
    assert httpx.options(f"{page.url}api/jobs", headers=cookies).status_code == 405


def test_s07_nothing_but_the_pages_files(page: Any) -> None:
    targets = [
        *("/static/../app.py", "/static/..%2fapp.py", "/static/%2e%2e/app.py", "/static/..%5capp.py", "/../app.py"),
        *("/static//etc/passwd", "/static/%2fetc%2fpasswd", "/static/x%00.js", "/static/", "/static", "/etc/passwd"),
        *("/static/....//app.py", "/app.py", "/index.html", "/static/../../../../../../etc/passwd"),
    ]
    for target in targets:
        answer = raw(page, target)
        status = int(answer.split(b" ", 2)[1])
        assert status in (404, 405, 403), target
        assert b"root:" not in answer
        assert b"import annotations" not in answer


def test_every_answer_has_the_policy(page: Any, home: Path) -> None:
    answers = [page.client.get(page.url + path) for path in ("", "static/main.js", "api/state", "api/none", "none")]
    answers.append(httpx.get(f"{page.url}api/state"))
    for answer in answers:
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
        assert answer.headers["x-content-type-options"] == "nosniff"
    kinds = [answer.headers["content-type"].partition(";")[0] for answer in answers[:3]]
    assert kinds == ["text/html", "text/javascript", "application/json"]
    assert "unsafe" not in POLICY
    report = page.client.get(f"{page.url}api/runs/one/report.html").headers["content-security-policy"]
    assert report.startswith("sandbox;")
    assert "allow-scripts" not in report


def test_bodies_have_a_limit(page: Any) -> None:
    big = {"command": "check", "words": ["x" * MAX_BODY_BYTES]}
    assert page.client.post(f"{page.url}api/jobs", json=big).status_code == 413
    for body in ("[", "[]", "1", "null", '{"command": "check"}', '{"words": ["a"]}', "[" * 100_000):
        response = page.client.post(f"{page.url}api/jobs", content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400, body
        assert response.json()["error"]["message"]


def test_with_a_token_only_who_knows_it_comes_in(open_page: Callable[..., Any], home: Path) -> None:
    page = open_page(home, token=TOKEN)
    first = page.client.get(page.url)
    assert first.status_code == 401
    assert "set-cookie" not in first.headers
    assert '<form method="post" action="/login">' in first.text
    assert "<script" not in first.text
    form = {"content-type": "application/x-www-form-urlencoded"}
    for given in ("", "token=", "token=x", f"token={TOKEN[:-1]}", f"token={TOKEN}x", f"other={TOKEN}"):
        assert page.client.post(f"{page.url}login", content=given, headers=form).status_code == 401
    assert page.client.get(f"{page.url}?token={TOKEN}").status_code == 401
    assert page.client.get(f"{page.url}api/state").status_code == 403
    entered = page.client.post(f"{page.url}login", content=f"token={TOKEN}", headers=form)
    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    assert TOKEN not in entered.headers["set-cookie"]
    assert page.client.get(page.url).status_code == 200
    assert page.get("state")["cwd"] == str(home)


def test_the_cookie_of_a_studio_without_a_token_does_not_open_one_with(
    page: Any, open_page: Callable[..., Any], home: Path
) -> None:
    other = open_page(home, token="another-" + "z" * 40)
    other.client.cookies = page.client.cookies
    assert other.client.get(f"{other.url}api/state").status_code == 403
