"""Who may open the page, and what the page may do: Host, Origin, a cookie, limits of a body, and a strict policy.

The cookie is set by the page itself (SameSite=Strict), so that no other site's page, and no program that only knows
the port, can use the API; with a token it is set only for who knows the token. It outlives the studio: a page that is
open while the studio is killed and started again goes on.
"""

from __future__ import annotations

import hashlib
import hmac
import html
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from truetune.disk import to_json
from truetune.messages import CATALOGUES, text
from truetune.serve.guard import BODY, Gone, Receive, Send, check_place, headers_of, read_body
from truetune.serve.schema import Refused

COOKIE, LANG_COOKIE = "truetune", "truetune_lang"
FORM = "application/x-www-form-urlencoded"
POLICY = (
    "default-src 'self'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
UPLOAD = "/api/files"


class Door:
    """An ASGI application around the studio's. `secret`: what the cookie is made of. `token`: None on this machine."""

    def __init__(self, app: Any, *, secret: str, token: str | None, lang: str) -> None:
        self._app, self._token, self._lang = app, token, lang
        self._cookie = hmac.new(secret.encode(), (token or "").encode(), hashlib.sha256).hexdigest()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Refuse a request, or hand it on, its body read unless it is a file; every answer gets the policy."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = headers_of(scope)
        lang = lang_of(headers, self._lang)

        async def send_with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                has = {name.lower() for name, _ in message["headers"]}
                added = {name.lower().encode(): value.encode() for name, value in HEADERS.items()}
                message["headers"] = [*message["headers"], *((n, v) for n, v in added.items() if n not in has)]
            await send(message)

        try:
            check_place(headers, is_local=self._token is None)
            await self._pass_on(scope, headers, receive=receive, send=send_with_policy)
        except Refused as error:
            told = {"error": {"key": error.key, "message": text(f"api.{error.key}", lang, **error.values)}}
            await _respond(send_with_policy, error.status, to_json(told), kind="application/json")
        except Gone:
            return

    async def _pass_on(self, scope: dict[str, Any], headers: dict[str, str], *, receive: Receive, send: Send) -> None:
        path, is_known = scope["path"], self._is_known(headers)
        if path == "/login" and scope["method"] == "POST":
            await self._login(headers, receive, send)
        elif path == "/" and not is_known and self._token is not None:
            await self._ask(headers, send)
        elif not path.startswith("/api/"):
            await self._app(scope, receive, self._with_cookie(send) if path == "/" else send)
        else:
            # A browser says so where another page of this machine (another port) asks.
            if not is_known or headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
                raise Refused("cookie", status=403, code="cookie")
            if scope["method"] == "POST" and path != UPLOAD:
                scope[BODY] = await read_body(headers, receive)
            await self._app(scope, receive, send)

    def _is_known(self, headers: dict[str, str]) -> bool:
        return hmac.compare_digest(_cookie(headers, COOKIE).encode(), self._cookie.encode())

    def _with_cookie(self, send: Send) -> Send:
        async def send_cookie(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"set-cookie", self._set_cookie().encode())]
            await send(message)

        return send_cookie

    def _set_cookie(self) -> str:
        return f"{COOKIE}={self._cookie}; HttpOnly; SameSite=Strict; Path=/; Max-Age=31536000"

    async def _login(self, headers: dict[str, str], receive: Receive, send: Send) -> None:
        """Give the cookie to who knows the token, and the page."""
        form = parse_qs((await read_body(headers, receive, kind=FORM)).decode(errors="replace"))
        given = form.get("token", [""])[0].strip()
        if self._token is None or not hmac.compare_digest(given.encode(), self._token.encode()):
            raise Refused("token", status=401, code="invalid_token")
        await _respond(send, 303, "", kind="text/plain", location="/", set_cookie=self._set_cookie())

    async def _ask(self, headers: dict[str, str], send: Send) -> None:
        """Ask for the token: a page without a script."""
        lang = lang_of(headers, self._lang)
        label, button = (html.escape(text(key, lang)) for key in ("studio.door_token", "studio.door_enter"))
        page = (
            f'<!doctype html><html lang="{lang}"><meta charset="utf-8"><title>Truetune</title>'
            f'<link rel="stylesheet" href="/static/style.css"><main><form method="post" action="/login">'
            f'<label>{label} <input type="password" name="token" autocomplete="current-password" required></label> '
            f"<button>{button}</button></form></main></html>"
        )
        await _respond(send, 401, page, kind="text/html; charset=utf-8")


def lang_of(headers: dict[str, str], default: str) -> str:
    """Return the language that the page was switched to, else `default`."""
    asked = _cookie(headers, LANG_COOKIE)
    return asked if asked in CATALOGUES else default


def _cookie(headers: dict[str, str], name: str) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


async def _respond(send: Send, status: int, body: str, *, kind: str, **headers: str) -> None:
    content = body.encode()
    told = {"content-type": kind, "content-length": str(len(content)), "connection": "close"}
    told |= {name.replace("_", "-"): value for name, value in headers.items()}
    pairs = [(name.encode(), value.encode()) for name, value in told.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})
