"""What needs an order of events that a running engine gives only sometimes."""

import asyncio
import dataclasses
from contextlib import aclosing

import pytest

from equipoise.serve.api.answer import _pieces
from equipoise.serve.api.plan import Plan
from equipoise.serve.api.tally import Tally
from equipoise.serve.engine import OverloadedError
from equipoise.serve.request import Output, Request

REQUESTS = [Request(id, (1, 2, 3), 4) for id in ("a", "b")]


class LateRefusal:
    """The first request is taken and answered at once, the second one refused a while later."""

    def __init__(self):
        self.closed = []

    async def stream(self, request, on_added):
        try:
            if request.id == "b":
                for _ in range(10):
                    await asyncio.sleep(0)
                raise OverloadedError("full")
            on_added()
            yield Output(request.id, token_ids=(7,))
            await asyncio.Event().wait()
        finally:
            self.closed.append(request.id)


def test_a_refusal_comes_before_the_first_piece():
    """And the request that was taken is cancelled."""
    loop, seen = LateRefusal(), []

    async def collect():
        async with aclosing(_pieces(loop, REQUESTS, Tally())) as pieces:
            async for piece in pieces:
                seen.append(piece)

    with pytest.raises(OverloadedError, match="full"):
        asyncio.run(collect())
    assert seen == []
    assert sorted(loop.closed) == ["a", "b"]


def test_of_a_prompts_choices_the_one_that_found_least_counts():
    """Two prompts of 3 and 5 tokens, two choices each; cached are 2 and 0 of the first, 4 and 4 of the second."""
    prompts = [(1, 2, 3), (1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5)]
    requests = tuple(dataclasses.replace(REQUESTS[0], prompt=prompt) for prompt in prompts)
    tally = Tally()
    tally.planned(Plan("x", 0, requests, n=2, seed=0, stream=False, include_usage=False))
    for index, cached in enumerate((2, 0, 4, 4)):
        tally.piece(index, Output("x", token_ids=(1, 2), finish="length", num_cached=cached))
    assert tally.usage == {
        "prompt_tokens": 8,
        "completion_tokens": 8,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert tally.counted("/x", 200, ()).finishes == ("length",) * 4


def test_a_request_that_never_began_used_nothing():
    tally = Tally()
    tally.planned(Plan("x", 0, tuple(REQUESTS), n=1, seed=0, stream=False, include_usage=False))
    assert tally.usage["prompt_tokens"] == 0
    assert tally.counted("/x", 429, ()).first_token is None
