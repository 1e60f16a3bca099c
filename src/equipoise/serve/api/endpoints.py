"""The endpoints: what each is called, what it takes, gives and may answer, and the function that does it.

The routes and the OpenAPI document are both made of this table.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from typing_extensions import TypedDict  # that of typing has no schema before Python 3.12

from equipoise.serve.api.answer import Form, Json, chunks, respond
from equipoise.serve.api.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from equipoise.serve.api.chat import ChatChunk, ChatCompletion, plan_chat
from equipoise.serve.api.completions import Completion, CompletionChunk, plan_completions
from equipoise.serve.api.health import HealthBody, answer, dead, health, not_ready
from equipoise.serve.api.plan import Caller, Plan, check_model, check_tokens
from equipoise.serve.api.read import read
from equipoise.serve.api.served import Served
from equipoise.serve.api.tally import Tally
from equipoise.serve.api.tokens import encode_prompt


@dataclass(frozen=True)
class Call:
    """One request that was let in. path: its parameters."""

    caller: Caller
    body: bytes
    path: Mapping[str, str]
    tally: Tally


@dataclass(frozen=True)
class Reply:
    """body: one object, or chunks of a stream."""

    body: Json | AsyncGenerator[Json, None]
    status: int = 200


@dataclass(frozen=True)
class Endpoint:
    """body: what it takes, None for nothing. answer: what it gives. statuses: other than 200. open: without a key.
    chunk: what it gives bit by bit, if it can."""

    method: Literal["GET", "POST"]
    path: str
    summary: str
    handler: Callable[[Served, Call], Awaitable[Reply]]
    answer: Any
    body: Any = None
    statuses: tuple[int, ...] = ()
    open: bool = False
    chunk: Any = None


class ModelBody(TypedDict):
    """The model that is served. max_model_len: tokens of prompt and answer together."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class ModelList(TypedDict):
    """All models: one."""

    object: str
    data: list[ModelBody]


class Tokens(TypedDict):
    """tokens: ids. count: how many. max_model_len: tokens of prompt and answer together."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(TypedDict):
    """prompt: the text of the tokens; bytes that are no text are U+FFFD."""

    prompt: str


class Probe(TypedDict):
    """status: ok."""

    status: str


async def _answer(served: Served, call: Call, make: Callable[[Served, Caller, bytes], tuple[Plan, Form]]) -> Reply:
    plan, form = await asyncio.to_thread(make, served, call.caller, call.body)
    call.tally.planned(plan)
    if plan.stream:
        return Reply(chunks(served, plan, form, call.tally))
    return Reply(await respond(served, plan, form, call.tally))


async def _completions(served: Served, call: Call) -> Reply:
    return await _answer(served, call, plan_completions)


async def _chat(served: Served, call: Call) -> Reply:
    return await _answer(served, call, plan_chat)


async def _models(served: Served, call: Call) -> Reply:
    models: ModelList = {"object": "list", "data": [_model_body(served)]}
    return Reply(models)


async def _model(served: Served, call: Call) -> Reply:
    check_model(served, call.path["model"])
    return Reply(_model_body(served))


def _model_body(served: Served) -> ModelBody:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "equipoise",
        "max_model_len": served.max_tokens,
    }


async def _tokenize(served: Served, call: Call) -> Reply:
    def work() -> Tokens:
        body = read(TokenizeBody, call.body)
        check_model(served, body.model)
        ids = encode_prompt(served.tokenizer, body.prompt)
        return {"tokens": ids, "count": len(ids), "max_model_len": served.max_tokens}

    return Reply(await asyncio.to_thread(work))


async def _detokenize(served: Served, call: Call) -> Reply:
    def work() -> Text:
        body = read(DetokenizeBody, call.body)
        check_model(served, body.model)
        check_tokens(served, "tokens", body.tokens)
        return {"prompt": served.tokenizer.decode(body.tokens)}

    return Reply(await asyncio.to_thread(work))


async def _health(served: Served, call: Call) -> Reply:
    status, body = health(served)
    return Reply(body, status)


async def _live(served: Served, call: Call) -> Reply:
    return Reply(answer(dead(served)))


async def _ready(served: Served, call: Call) -> Reply:
    return Reply(answer(not_ready(served)))


async def _document(served: Served, call: Call) -> Reply:
    from equipoise.serve.api.document import document

    return Reply(await asyncio.to_thread(document))


_TAKES, _COMPUTES = (400, 401, 404, 408, 413, 415, 500), (429, 503)
ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint(
        "POST", "/v1/completions", "Continue texts", _completions, Completion, CompletionBody,
        (*_TAKES, *_COMPUTES), chunk=CompletionChunk,
    ),
    Endpoint(
        "POST", "/v1/chat/completions", "Answer conversations", _chat, ChatCompletion, ChatBody,
        (*_TAKES, *_COMPUTES), chunk=ChatChunk,
    ),
    Endpoint("GET", "/v1/models", "List the model", _models, ModelList, statuses=(401, 500)),
    Endpoint("GET", "/v1/models/{model}", "Describe the model", _model, ModelBody, statuses=(401, 404, 500)),
    Endpoint("POST", "/tokenize", "Text to token ids", _tokenize, Tokens, TokenizeBody, _TAKES),
    Endpoint("POST", "/detokenize", "Token ids to text", _detokenize, Text, DetokenizeBody, _TAKES),
    Endpoint("GET", "/health", "How it is, and why", _health, HealthBody, statuses=(500, 503), open=True),
    Endpoint("GET", "/health/live", "Whether it makes progress", _live, Probe, statuses=(500, 503), open=True),
    Endpoint("GET", "/health/ready", "Whether it takes requests", _ready, Probe, statuses=(500, 503), open=True),
    Endpoint("GET", "/openapi.json", "This document", _document, dict[str, Any], statuses=(401, 500)),
)  # fmt: skip
