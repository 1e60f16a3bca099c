"""Connections that become websockets, as the dashboard's do, are not cut off as heads that never end."""

import threading
import time

import uvicorn
from websockets.sync.client import connect

from equipoise.serve.api.served import Bounds
from equipoise.serve.api.wire import uvicorn_config

BOUNDS = Bounds(header_seconds=0.3)


async def echo(scope, receive, send):
    assert scope["type"] == "websocket"
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"]})


def test_a_websocket_stays_open():
    server = uvicorn.Server(uvicorn_config(echo, BOUNDS, port=0, ws="websockets-sansio"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with connect(f"ws://127.0.0.1:{port}/") as socket:
            time.sleep(3 * BOUNDS.header_seconds)
            socket.send("still there?")
            assert socket.recv(5) == "still there?"
    finally:
        server.should_exit = True
        thread.join(30)
