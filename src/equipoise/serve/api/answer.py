"""Requests to the engine, pieces of answers back, and the envelope around them: whole, or chunk by chunk.

Both endpoints share this; how a choice looks is their `Writer`'s business.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from typing_extensions import TypedDict  # that of typing has no schema before Python 3.12

from equipoise.serve.api.errors import ApiError, log
from equipoise.serve.api.plan import Plan
from equipoise.serve.api.served import Served
from equipoise.serve.api.tally import Tally
from equipoise.serve.loop import EngineLoop, StoppedError
from equipoise.serve.request import Output, Request

Json = Mapping[str, Any]


class RoutedExperts(TypedDict):
    """Of one choice: which experts each routed token went to, prompt first. data: base64 of int16, little-endian, of
    shape [layers, tokens, experts per token]; -1 where a token went to fewer experts than others."""

    index: int
    shape: list[int]
    dtype: str
    data: str


class Extra(TypedDict, total=False):
    """What this server says besides. seed: of the first choice; layers: names, in the order of routed_experts."""

    seed: int
    layers: list[str]
    routed_experts: list[RoutedExperts]


class Writer(Protocol):
    """How one choice looks. It is made for one answer, and remembers what it has written of it."""

    def whole(self, answer: Output) -> Json:
        """The choice of a response that comes in one piece."""
        ...

    def pieces(self, piece: Output) -> Sequence[Json]:
        """Choices for the chunks that this piece makes; at least one for the last piece."""
        ...


@dataclass(frozen=True)
class Form:
    """Of an endpoint's responses: its objects' names, a writer per choice. at_once: each choice in one chunk."""

    whole: str
    chunk: str
    writers: Sequence[Writer]
    at_once: bool = False


async def respond(served: Served, plan: Plan, form: Form, tally: Tally) -> Json:
    """The response as one object."""
    pieces: list[list[Output]] = [[] for _ in plan.requests]
    async with aclosing(_pieces(served.loop, plan.requests, tally)) as outputs:
        async for index, output in outputs:
            pieces[index].append(output)
    answers = [_joined(each) for each in pieces]
    choices = [writer.whole(answer) for writer, answer in zip(form.writers, answers, strict=True)]
    return {
        **_envelope(served, plan, form.whole),
        "choices": choices,
        "usage": tally.usage,
        "equipoise": _extra(served, plan, dict(enumerate(answers))),
    }


async def chunks(served: Served, plan: Plan, form: Form, tally: Tally) -> AsyncGenerator[Json, None]:
    """The response as chunks, one choice in each; the last chunk has what is said once."""
    envelope = _envelope(served, plan, form.chunk)
    if plan.include_usage:
        envelope = {**envelope, "usage": None}
    held: list[list[Output]] = [[] for _ in plan.requests]
    ended: dict[int, Output] = {}
    async with aclosing(_pieces(served.loop, plan.requests, tally)) as outputs:
        async for index, output in outputs:
            held[index].append(output)
            if output.finish is not None:
                ended[index] = output
            elif form.at_once:
                continue
            choices = form.writers[index].pieces(_joined(held[index]))
            held[index] = []
            all_ended = len(ended) == len(plan.requests) and not plan.include_usage
            for number, choice in enumerate(choices, 1):
                chunk = {**envelope, "choices": [choice]}
                if all_ended and number == len(choices):
                    chunk["equipoise"] = _extra(served, plan, ended)
                yield chunk
    if plan.include_usage:
        yield {**envelope, "choices": [], "usage": tally.usage, "equipoise": _extra(served, plan, ended)}


async def _pieces(
    loop: EngineLoop, requests: Sequence[Request], tally: Tally
) -> AsyncGenerator[tuple[int, Output], None]:
    """Pieces of all answers as they come, with the index of their request. Leaving early cancels what is left.

    There is no piece before the engine has taken all requests, so that a refusal comes first.
    Raises what `EngineLoop.stream` raises, and ApiError for a request that the engine gave up.
    """
    if len(requests) == 1:  # as nearly always: without a queue and a task in between, which cost as much as the rest
        async with aclosing(loop.stream(requests[0])) as outputs:
            async for output in outputs:
                tally.piece(0, output)
                _check(output)
                yield 0, output
        return
    async with aclosing(_together(loop, requests)) as pieces:
        early: list[tuple[int, Output]] = []
        not_taken = len(requests)
        async for index, got in pieces:
            if got is None:
                not_taken -= 1
            else:
                tally.piece(index, got)
                _check(got)
                early.append((index, got))
            while early and not not_taken:
                yield early.pop(0)


async def _together(loop: EngineLoop, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Output | None], None]:
    """Pieces of several answers with the index of their request; None when the engine has taken it."""
    queue: asyncio.Queue[tuple[int, Output | Exception | None]] = asyncio.Queue()

    async def follow(index: int, request: Request) -> None:
        try:
            async with aclosing(loop.stream(request, lambda: queue.put_nowait((index, None)))) as outputs:
                async for output in outputs:
                    queue.put_nowait((index, output))
        except Exception as error:  # it is raised below, where the answers are awaited
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(follow(index, request)) for index, request in enumerate(requests)]
    left = len(tasks)
    try:
        while left:
            index, got = await queue.get()
            if isinstance(got, Exception):
                raise got
            left -= got is not None and got.finish is not None
            yield index, got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check(output: Output) -> None:
    """Raise for an answer that is none."""
    if output.finish == "failed":
        log.error("request %s failed in the engine: %s", output.id, output.error)
        raise ApiError(
            500, f"the engine could not compute this; the server's log has it as request {output.id}", None, "failed"
        )
    if output.finish == "cancelled":
        raise StoppedError(output.error or "the request was cancelled by the server")


def _joined(pieces: Sequence[Output]) -> Output:
    """One piece of several in a row."""
    if len(pieces) == 1:
        return pieces[0]
    return pieces[-1]._replace(
        token_ids=tuple(id for each in pieces for id in each.token_ids),
        text="".join(each.text for each in pieces),
        logprobs=tuple(logprob for each in pieces for logprob in each.logprobs),
    )


def _envelope(served: Served, plan: Plan, name: str) -> dict[str, Any]:
    return {"id": plan.id, "object": name, "created": plan.created, "model": served.name}


def _extra(served: Served, plan: Plan, answers: Mapping[int, Output]) -> Extra:
    extra: Extra = {"seed": plan.seed}
    routed = [
        _routed(index, answers[index].experts) for index in sorted(answers) if plan.requests[index].routed_experts
    ]
    if routed:
        extra |= {"layers": list(served.layers), "routed_experts": routed}
    return extra


def _routed(index: int, experts_LTK: np.ndarray | None) -> RoutedExperts:
    ids_LTK = np.empty((0, 0, 0), "<i2") if experts_LTK is None else np.ascontiguousarray(experts_LTK, "<i2")
    data = base64.b64encode(ids_LTK.tobytes()).decode()
    return {"index": index, "shape": list(ids_LTK.shape), "dtype": "int16", "data": data}
