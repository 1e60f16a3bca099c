"""One request from its first byte to its last: who asks, the body in time and in bounds, the answer or an error in
OpenAI's form, and the end of all work on it when the client goes away.

Plain ASGI; it does not know what the endpoints do.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

from equipoise.serve.api.access import client_of, given_key, is_known
from equipoise.serve.api.endpoints import Call, Endpoint, Reply
from equipoise.serve.api.errors import ApiError, api_error, log
from equipoise.serve.api.plan import Caller
from equipoise.serve.api.served import GONE, Counted, Served
from equipoise.serve.api.tally import Tally

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

NOTHING: Mapping[str, str] = {}
PING = ": still here\n\n"
LINGER_SECONDS, LINGER_BYTES = 2.0, 8 * 2**20  # for the rest of a body that is too large
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PREFIXES = {"/v1/completions": "cmpl-", "/v1/chat/completions": "chatcmpl-"}


class ClientGoneError(Exception):
    """Whoever asked is no longer there, or does not take what is sent."""


async def converse(served: Served, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer one request."""
    tally, headers = Tally(), _headers(scope)
    degraded = _printable(served.degraded())
    request_id = headers.get("x-request-id", "")
    if not _REQUEST_ID.fullmatch(request_id):
        request_id = secrets.token_hex(16)
    speaker = Speaker(send, served.bounds.write_seconds, _always(request_id, degraded))
    unread = endpoint.body is not None
    try:
        caller = _let_in(served, endpoint, scope, headers)
        body = await _body(served, headers, receive) if unread else b""
        unread = False
        call = Call(caller, body, scope.get("path_params", {}), tally)
        await unless_gone(receive, _say(served, endpoint, call, speaker))
        status = speaker.status
    except (ClientGoneError, asyncio.CancelledError) as error:
        status = speaker.status if speaker.complete else GONE
        if isinstance(error, asyncio.CancelledError):  # some proxies say it so
            _count(served, tally.counted(endpoint.path, status, degraded), request_id)
            raise
    except Exception as error:
        problem = api_error(error, request_id, served.retry_after())
        status = problem.status
        await speaker.complain(problem, receive if unread and status != 408 else None)
    _count(served, tally.counted(endpoint.path, status, degraded), request_id)


def _count(served: Served, counted: Counted, request_id: str) -> None:
    try:
        served.count(counted)
    except Exception:  # who counts must not take down what is counted
        log.exception("counting request %s failed", request_id)


def _let_in(served: Served, endpoint: Endpoint, scope: Scope, headers: Mapping[str, str]) -> Caller:
    """Who it is. Raises ApiError 401."""
    key = given_key(headers)
    if served.keys and not endpoint.open and not is_known(key, served.keys):
        message = "expected an API key of this server, as 'Authorization: Bearer KEY', got "
        told = "none" if key is None else "another"
        raise ApiError(401, message + told, None, "invalid_api_key", {"www-authenticate": "Bearer"})
    address = (scope.get("client") or ("", 0))[0]
    id = _PREFIXES.get(endpoint.path, "") + secrets.token_hex(16)
    return Caller(id, client_of(key if served.keys else None, address), time.monotonic())


async def _body(served: Served, headers: Mapping[str, str], receive: Receive) -> bytes:
    """All of it. Raises ApiError for one that is too large, too slow or no JSON, ClientGoneError for half of one."""
    bounds = served.bounds
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # also what keeps pages of other hosts out: a browser asks before it sends JSON elsewhere, and gets no leave
        raise ApiError(415, f"content-type: expected application/json, got {kind[:100] or 'none'}", None, "not_json")
    too_large = ApiError(
        413, f"the body is larger than {bounds.max_body} bytes; send less at a time", None, "too_large"
    )
    length = headers.get("content-length", "")
    if length.isdigit() and (len(length) > 18 or int(length) > bounds.max_body):
        raise too_large
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(bounds.body_seconds):
            while more:
                piece, more = await _next_piece(receive)
                body += piece
                if len(body) > bounds.max_body:
                    raise too_large
    except TimeoutError as error:
        message = f"the body did not arrive within {bounds.body_seconds:g} s"
        raise ApiError(408, message, None, "too_slow", {"connection": "close"}) from error
    return bytes(body)


async def _next_piece(receive: Receive) -> tuple[bytes, bool]:
    """A piece of a body, and whether there are more. Raises ClientGoneError for half of one."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGoneError
    return message.get("body", b""), message.get("more_body", False)


async def unless_gone(receive: Receive, work: Awaitable[None]) -> None:
    """Do the work, but stop it, with all that belongs to it, and raise ClientGoneError if the client goes away."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGoneError
        await tasks[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _say(served: Served, endpoint: Endpoint, call: Call, speaker: Speaker) -> None:
    reply: Reply = await endpoint.handler(served, call)
    if isinstance(reply.body, Mapping):
        await speaker.say(reply.status, json.dumps(reply.body).encode())
        return
    async with aclosing(reply.body) as chunks, speaker.kept_alive(served.bounds.ping_seconds):
        async for chunk in chunks:
            await speaker.event(json.dumps(chunk))
    await speaker.event("[DONE]", last=True)


class Speaker:
    """Sends one response. status: 0 until it has begun. complete: its last byte is on its way."""

    def __init__(self, send: Send, seconds: float, headers: Mapping[str, str]) -> None:
        self._send, self._seconds, self._headers = send, seconds, headers
        self._one_at_a_time = asyncio.Lock()
        self._last = 0.0  # when something was sent
        self.status = 0
        self.complete = False

    async def say(self, status: int, body: bytes, headers: Mapping[str, str] = NOTHING, more: bool = False) -> None:
        """The whole response; with `more`, its end is still to be sent."""
        length = {"content-type": "application/json", "content-length": str(len(body))}
        await self._begin(status, {**length, **headers})
        await self._write({"type": "http.response.body", "body": body, "more_body": more})

    async def event(self, data: str, name: str = "", last: bool = False) -> None:
        """A server-sent event; the first one begins the response."""
        await self._stream(f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n", last)

    @asynccontextmanager
    async def kept_alive(self, seconds: float) -> AsyncIterator[None]:
        """In it, a comment is sent after so many seconds of silence. Clients ignore it; it too begins the response."""
        clock = asyncio.get_running_loop().time
        self._last = clock()

        async def ping() -> None:
            while not self.complete:
                await asyncio.sleep(self._last + seconds - clock())
                if clock() >= self._last + seconds:
                    await self._stream(PING)

        pinging = asyncio.create_task(ping())
        try:
            yield
        finally:
            pinging.cancel()
            await asyncio.gather(pinging, return_exceptions=True)  # whoever is gone is missed by the next event too

    async def _stream(self, text: str, last: bool = False) -> None:
        async with self._one_at_a_time:
            if not self.status:
                kind = "text/event-stream; charset=utf-8"
                await self._begin(200, {"content-type": kind, "cache-control": "no-cache", "x-accel-buffering": "no"})
            await self._write({"type": "http.response.body", "body": text.encode(), "more_body": not last})
            self._last = asyncio.get_running_loop().time()

    async def complain(self, problem: ApiError, rest: Receive | None) -> None:
        """The error as response, or as the last event of one that has begun. Nobody may be there to hear it.

        rest: where the rest of the request's body comes from, if it has not been read.
        """
        body = json.dumps(problem.body)
        try:
            if self.status:
                await self.event(body, "error", last=True)
            elif rest is not None:
                await self.say(problem.status, body.encode(), {**problem.headers, "connection": "close"}, more=True)
                await _discard(rest)  # a client that still sends would find the connection broken, and no answer
                await self._write({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await self.say(problem.status, body.encode(), problem.headers)
        except ClientGoneError:
            return

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        listed = [(name.encode(), value.encode("latin-1")) for name, value in {**self._headers, **headers}.items()]
        self.status = status
        await self._write({"type": "http.response.start", "status": status, "headers": listed})

    async def _write(self, message: Message) -> None:
        self.complete = message.get("more_body") is False
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(message)
        except (TimeoutError, OSError) as error:
            raise ClientGoneError from error


async def _discard(receive: Receive) -> None:
    """Read on for a while, and forget it."""
    size, more = 0, True
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while more and size < LINGER_BYTES:
                piece, more = await _next_piece(receive)
                size += len(piece)
    except (TimeoutError, ClientGoneError):
        return


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _always(request_id: str, degraded: tuple[str, ...]) -> dict[str, str]:
    headers = {"x-request-id": request_id, "x-content-type-options": "nosniff"}
    return {**headers, "x-equipoise-degraded": ", ".join(degraded)} if degraded else headers


def _printable(reasons: tuple[str, ...]) -> tuple[str, ...]:
    """As a header can carry them."""
    return tuple("".join(c if c.isascii() and c.isprintable() and c != "," else "?" for c in each) for each in reasons)
