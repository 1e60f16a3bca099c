"""A client of OpenAI's completions that keeps times: one request, streamed, from its sending to its end.

aiohttp and a few lines for server-sent events. A client must not be what is measured: with 64 requests at a time httpx,
which the official client is made of, takes several times the processor time per token and lets some of them wait for
seconds.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

PATIENCE_S = 180.0
Body = Mapping[str, Any]


@dataclass(eq=False)
class Told:
    """What came of one request. Times are seconds of time.perf_counter.

    pieces: when each chunk with text came. degraded, seed: as the server says. error: empty for an answer that ended as
    it should. left: this client went away before the end, as it had meant to.
    """

    body: Body
    began: float
    ended: float = 0.0
    pieces: list[float] = field(default_factory=list)
    text: str = ""
    id: str = ""
    finish: str = ""
    status: int = 0
    degraded: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    error: str = ""
    left: bool = False

    @property
    def finished(self) -> bool:
        """Whether the whole answer came."""
        return self.finish in ("stop", "length") and not self.error and not self.left

    @property
    def first_s(self) -> float | None:
        """From the sending to the first piece."""
        return self.pieces[0] - self.began if self.pieces else None

    @property
    def between_s(self) -> list[float]:
        """From piece to piece."""
        return [after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)]


async def ask(client: aiohttp.ClientSession, api: str, body: Body, leave_after: int | None = None) -> Told:
    """Send it and read the stream to its end, or leave after so many pieces. Never raises for what the server does."""
    told = Told(body, time.perf_counter())
    try:
        async with client.post(f"{api}/completions", json={**body, "stream": True}) as response:
            told.status = response.status
            told.degraded = response.headers.get("x-equipoise-degraded", "")
            if response.status != 200:
                told.error = f"status {response.status}: {(await response.text())[:400]}"
            else:
                await _read(told, response, leave_after)
    except (aiohttp.ClientError, TimeoutError) as error:
        told.error = f"{type(error).__name__}: {error}"
    told.ended = time.perf_counter()
    if not told.error and not told.left and not told.finish:
        told.error = "the stream ended without a finish_reason"
    return told


async def _read(told: Told, response: aiohttp.ClientResponse, leave_after: int | None) -> None:
    async for line in response.content:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            told.error = str(chunk["error"])[:200]
            return
        told.id = chunk.get("id", told.id)
        told.usage = chunk.get("usage") or told.usage
        told.seed = chunk.get("equipoise", {}).get("seed", told.seed)
        for choice in chunk.get("choices", ()):
            if choice.get("text"):
                told.pieces.append(time.perf_counter())
                told.text += choice["text"]
            told.finish = choice.get("finish_reason") or told.finish
        if leave_after is not None and len(told.pieces) >= leave_after and not told.finish:
            told.left = True
            response.close()
            return


def new_client() -> aiohttp.ClientSession:
    """For any number of requests at a time. Call it where an event loop runs."""
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=PATIENCE_S))


class Together:
    """Asks many things at the same time, from code that is not asynchronous. Connections are kept from call to call."""

    def __init__(self, api: str) -> None:
        self._api, self._runner = api, asyncio.Runner()
        self._client = self._runner.run(_made())

    def ask(self, bodies: Sequence[Body], at_once: int | None = None) -> list[Told]:
        """All answers. at_once: open at the same time. Raises RuntimeError unless every one is whole."""

        async def all_of_them() -> list[Told]:
            free = asyncio.Semaphore(at_once or len(bodies) or 1)

            async def in_turn(body: Body) -> Told:
                async with free:
                    return await ask(self._client, self._api, body)

            return await asyncio.gather(*map(in_turn, bodies))

        told = self._runner.run(all_of_them())
        if errors := [each.error for each in told if not each.finished]:
            raise RuntimeError(f"{len(errors)} of {len(told)} requests failed: {errors[0]}")
        return told

    def close(self) -> None:
        """Give the connections back."""
        self._runner.run(self._client.close())
        self._runner.close()


async def _made() -> aiohttp.ClientSession:
    return new_client()
