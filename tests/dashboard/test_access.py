"""Who gets in: the rules of binding, and the guard in front of a small application."""

from __future__ import annotations

import asyncio

import pytest

from equipoise.dashboard.access import Access, Guard, check_binding, is_loopback

TOKEN = "correct-horse"


class TestBinding:
    @pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"])
    def test_this_machine_needs_no_token(self, host):
        assert is_loopback(host)
        check_binding(host, 8765, None)

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "", "localhost.example.org"])
    def test_other_hosts_need_one(self, host):
        with pytest.raises(ValueError, match=r"host: .* can be reached from other machines, and there is no token"):
            check_binding(host, 8765, None)
        check_binding(host, 8765, TOKEN)

    @pytest.mark.parametrize("token", ["", "short", "newline\nnewline", "schlüssel-wort"])
    def test_a_token_is_not_easily_guessed(self, token):
        with pytest.raises(ValueError, match="token: expected at least 8 printable ASCII characters"):
            check_binding("127.0.0.1", 8765, token)

    def test_a_port_is_a_port(self):
        with pytest.raises(ValueError, match=r"port: expected 0 \(any that is free\) to 65535, got 70000"):
            check_binding("127.0.0.1", 70000, None)


async def hello(scope, receive, send):
    """The application behind the guard."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


def ask(token=None, *, kind="http", path="/", query="", extensions=(), **headers):
    """The first message that the guard sends, with its headers as a dictionary."""
    sent = []

    async def receive():
        return {"type": f"{kind}.connect"}

    async def send(message):
        sent.append(message)

    raw = [
        (key.replace("_", "-").encode(), value.encode()) for key, value in {"host": "localhost:1", **headers}.items()
    ]
    scope = {"type": kind, "path": path, "query_string": query.encode(), "headers": raw}
    scope["extensions"] = {each: {} for each in extensions}
    asyncio.run(Guard(hello, Access(token, 8765))(scope, receive, send))
    first = dict(sent[0])
    first["headers"] = {key.decode(): value.decode() for key, value in first.get("headers", [])}
    return first


class TestGuard:
    def test_without_a_token_this_machine_gets_in(self):
        assert ask()["status"] == 200
        assert ask(host="127.0.0.1:8765")["status"] == 200
        assert ask(host="[::1]:8765")["status"] == 200

    def test_a_name_that_points_here_does_not(self):
        """DNS rebinding: a page of evil.example resolves its own name to 127.0.0.1."""
        assert ask(host="evil.example:8765")["status"] == 403
        assert ask(host="")["status"] == 403

    def test_a_page_elsewhere_does_not(self):
        assert ask(kind="websocket", origin="http://evil.example")["type"] == "websocket.close"
        assert ask(origin="http://localhost:9999")["status"] == 403  # another program of this machine
        assert ask(kind="websocket", origin="http://localhost:1")["type"] == "websocket.accept"

    def test_with_a_token_nothing_is_told_without_it(self):
        for path in ("/", "/_nicegui/x.js", "/_equipoise/static/dashboard.js", "/nowhere"):
            refused = ask(TOKEN, path=path)
            assert refused["status"] == 401
            assert refused["headers"]["cache-control"] == "no-store"
        for wrong in ("", "wrong-horse", TOKEN + "x", TOKEN[:-1]):
            assert ask(TOKEN, query=f"token={wrong}")["status"] == 401
            assert ask(TOKEN, authorization=f"Bearer {wrong}")["status"] == 401
            assert ask(TOKEN, cookie=f"equipoise_8765={wrong}")["status"] == 401
        assert ask(TOKEN, cookie="\x00;=;;")["status"] == 401

    def test_websockets_are_refused_too(self):
        assert ask(TOKEN, kind="websocket")["type"] == "websocket.close"
        refused = ask(TOKEN, kind="websocket", extensions=["websocket.http.response"])
        assert (refused["type"], refused["status"]) == ("websocket.http.response.start", 401)

    def test_the_token_in_the_address_becomes_a_cookie(self):
        answer = ask(TOKEN, path="/run/x", query=f"layer=a%26b&token={TOKEN}")
        assert answer["status"] == 303
        assert answer["headers"]["location"] == "/run/x?layer=a%26b"
        cookie = answer["headers"]["set-cookie"]
        assert "HttpOnly; SameSite=Strict" in cookie
        assert TOKEN not in cookie
        assert ask(TOKEN, cookie=cookie.partition(";")[0])["status"] == 200
        assert ask(TOKEN, kind="websocket", cookie=cookie.partition(";")[0])["type"] == "websocket.accept"

    def test_the_way_on_stays_here(self):
        assert ask(TOKEN, path="//evil.example/", query=f"token={TOKEN}")["headers"]["location"] == "/evil.example/"

    def test_a_header_does_as_well(self):
        assert ask(TOKEN, authorization=f"Bearer {TOKEN}", host="gpu-7:8765")["status"] == 200

    def test_pages_may_load_nothing_from_elsewhere(self):
        policy = ask()["headers"]["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "http" not in policy
