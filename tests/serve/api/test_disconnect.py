"""A client that goes away takes its requests with it, and nobody else's."""

import asyncio
import json
import socket
import threading

import pytest
from tests.serve.api.serving import MAX_TOKENS, expected, wait_until

from equipoise.serve.api.app import create_app
from equipoise.serve.api.served import GONE

LONG = {"model": "tiny", "max_tokens": MAX_TOKENS - 10, "ignore_eos": True}


def send(server, path: str, body: dict) -> socket.socket:
    """A request on a connection of its own."""
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(head.encode() + raw)
    return connection


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x"},
        {"prompt": "x", "stream": True},
        {"prompt": ["a", "b"], "n": 2},
        {"prompt": ["a", "b"], "n": 2, "stream": True},
    ],
    ids=str,
)
def test_leaving_cancels(server, client, model, body):
    server.counted.clear()
    other = client.completions.create(model="tiny", prompt="other", seed=1, max_tokens=100, stream=True)
    next(other)
    server.counted.clear()
    connection = send(server, "/v1/completions", LONG | body)
    asked = len(body["prompt"]) * body.get("n", 1)
    assert wait_until(lambda: server.served.loop.progress().num_open >= asked)
    if body.get("stream"):
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK")
    connection.close()
    assert wait_until(lambda: any(each.status == GONE for each in server.counted))
    [gone] = [each for each in server.counted if each.status == GONE]
    assert gone.answer_tokens < asked * LONG["max_tokens"]
    list(other)
    assert server.idle()
    [choice] = client.completions.create(model="tiny", prompt="other", seed=1, max_tokens=100).choices
    assert choice.text == expected(model, "other", 100, seed=1).text


def test_leaving_cancels_what_still_waits(server):
    """The engine is held, so that nothing has begun."""
    go = threading.Event()
    server.served.loop.between_steps(go.wait)
    server.counted.clear()
    try:
        connection = send(server, "/v1/completions", LONG | {"prompt": "x"})
        assert wait_until(lambda: server.served.loop.progress().num_open == 1)
        connection.close()
        assert wait_until(lambda: server.counted)
        assert server.counted[0].status == GONE
        assert server.counted[0].answer_tokens == server.counted[0].prompt_tokens == 0
    finally:
        go.set()
    assert server.idle()


def test_half_a_body_and_gone(server):
    server.counted.clear()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    connection.sendall(head)
    connection.close()
    assert wait_until(lambda: server.counted)
    assert server.counted[0].status == GONE


def test_closing_a_stream_of_the_official_client_cancels(server, client):
    server.counted.clear()
    with client.completions.create(
        model="tiny", prompt="x", max_tokens=LONG["max_tokens"], stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(stream)
    assert server.idle()
    assert wait_until(lambda: server.counted)
    assert server.counted[0].status == GONE
    assert 0 < server.counted[0].answer_tokens < LONG["max_tokens"]


def test_a_cancelled_task_is_a_client_that_went_away(server):
    """As Ray Serve says it: no message, the application's task is cancelled."""
    server.counted.clear()
    body = [{"type": "http.request", "body": json.dumps(LONG | {"prompt": "x", "stream": True}).encode()}]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions"}
    scope |= {"query_string": b"", "headers": [(b"content-type", b"application/json")], "root_path": ""}

    async def main():
        begun = asyncio.Event()

        async def receive():
            if not body:
                await asyncio.Event().wait()
            return body.pop()

        async def send(message):
            begun.set()

        task = asyncio.create_task(create_app(server.served)(scope, receive, send))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert [each.status for each in server.counted] == [GONE]
    assert server.idle()
