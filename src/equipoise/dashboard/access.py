"""Who may see the dashboard: this machine only, or whoever has the token. An ASGI middleware and the rules it keeps.

It guards pages, static files and websockets alike. It encrypts nothing: across a network, use TLS or a tunnel.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MIN_TOKEN = 8  # characters
SECURITY_HEADERS = {
    # nothing from other hosts, ever; eval and inline scripts are how NiceGUI starts its pages
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True)
class Access:
    """What is asked of a request. token: None for this machine only. port: the cookie is named after it."""

    token: str | None
    port: int

    @property
    def cookie(self) -> str:
        """The cookie's name: one per port, because browsers share cookies among the ports of a host."""
        return f"equipoise_{self.port}"

    @property
    def secret(self) -> str:
        """The cookie's value: it follows from the token, and does not give it away."""
        return hashlib.sha256(f"equipoise dashboard {self.token}".encode()).hexdigest()


def check_binding(host: str, port: int, token: str | None) -> None:
    """Raise ValueError for no port, a token that is easily guessed, and a host that others can reach without one."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port: expected 0 (any that is free) to 65535, got {port}")
    if token is not None and (len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable()):
        raise ValueError(
            f"token: expected at least {MIN_TOKEN} printable ASCII characters, got {len(token)}; "
            f"for example {secrets.token_urlsafe(16)}"
        )
    if token is None and not is_loopback(host):
        raise ValueError(
            f"host: {host} can be reached from other machines, and there is no token; leave out --host for this "
            f"machine only, or add a token (--token-file FILE), for example {secrets.token_urlsafe(16)}"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """The middleware. A page that is asked for with ?token=... is answered with a cookie, and an address without it."""

    def __init__(self, app: App, access: Access) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with 401 or 403."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))
        if reason := _foreign(headers, self.access):
            await _refuse(scope, receive, send, 403, reason)
        elif self.access.token is not None and not self._known(headers, query):
            await _refuse(scope, receive, send, 401, "401: open the address with ?token=..., as the command printed it")
        elif scope["type"] == "http" and "token" in query and self.access.token is not None:
            await self._welcome(scope, query, send)
        else:
            await self.app(scope, receive, _with_headers(send))

    def _known(self, headers: Mapping[str, str], query: Mapping[str, str]) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        tokens = [query.get("token", ""), bearer if scheme.lower() == "bearer" else ""]
        token = self.access.token or ""
        if any(_same(given, token) for given in tokens):
            return True
        return _same(_cookies(headers).get(self.access.cookie, ""), self.access.secret)

    async def _welcome(self, scope: Scope, query: Mapping[str, str], send: Send) -> None:
        rest = urlencode({key: value for key, value in query.items() if key != "token"})
        path = scope.get("raw_path", scope["path"].encode()).decode("latin-1").partition("?")[0]
        place = "/" + path.lstrip("/") + (f"?{rest}" if rest else "")  # one slash: //host would be another host
        cookie = f"{self.access.cookie}={self.access.secret}; Path=/; HttpOnly; SameSite=Strict; Max-Age=2592000"
        await _answer(send, 303, b"", {"location": place, "set-cookie": cookie})


def _foreign(headers: Mapping[str, str], access: Access) -> str:
    """Why a request is not from a page of ours; empty when it may be.

    A page elsewhere may open a websocket to this machine: its Origin gives it away. Or have its own name point here
    (DNS rebinding): then the Host is not this machine's. With a token, whoever has it may use any name.
    """
    host = headers.get("host", "")
    if access.token is None and not is_loopback(urlsplit(f"//{host}").hostname or ""):
        return "403: this dashboard answers to localhost only"
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        return "403: the request comes from a page elsewhere"
    return ""


def read_token(path: Path) -> str:
    """The first line of a file; empty for an empty one, which no token may be. Raises OSError."""
    return path.read_text(encoding="utf-8").partition("\n")[0].strip()


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())


def _cookies(headers: Mapping[str, str]) -> dict[str, str]:
    try:
        return {key: morsel.value for key, morsel in SimpleCookie(headers.get("cookie", "")).items()}
    except CookieError:
        return {}


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, text: str) -> None:
    if scope["type"] == "http":
        await _answer(send, status, text.encode(), {"content-type": "text/plain; charset=utf-8"})
        return
    await receive()  # the websocket's "connect"
    if "websocket.http.response" in scope.get("extensions", {}):
        await _answer(send, status, text.encode(), {"content-type": "text/plain"}, prefix="websocket.http")
    else:
        await send({"type": "websocket.close", "code": 1008})


async def _answer(send: Send, status: int, body: bytes, headers: Mapping[str, str], prefix: str = "http") -> None:
    whole = {**headers, **SECURITY_HEADERS, "cache-control": "no-store", "content-length": str(len(body))}
    raw = [(key.encode(), value.encode("latin-1")) for key, value in whole.items()]
    await send({"type": f"{prefix}.response.start", "status": status, "headers": raw})
    await send({"type": f"{prefix}.response.body", "body": body})


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            raw = [(key.encode(), value.encode()) for key, value in SECURITY_HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *raw]}
        await send(message)

    return sending
