"""What a client asks for, as requests to the engine: limits, defaults, seeds and stops."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace

from equipoise.serve.api.bodies import Common
from equipoise.serve.api.errors import ApiError, invalid
from equipoise.serve.api.served import Served
from equipoise.serve.request import MAX_STOPS, Request, Sampling

MAX_N = 16
MAX_BIASES = 300
MAX_STOP_IDS = 256
MAX_STOP_CHARACTERS = 256


@dataclass(frozen=True)
class Caller:
    """Who asks. id: of the request, for logs. client: whose turn it is, unless the request names a user. arrived:
    seconds of time.monotonic."""

    id: str
    client: str
    arrived: float


@dataclass(frozen=True)
class Prompts:
    """What to continue. tokens: of each prompt. field: what the client calls it."""

    tokens: tuple[tuple[int, ...], ...]
    field: str


@dataclass(frozen=True)
class Wanted:
    """What the two endpoints ask for in their own words. max_tokens: None for default_tokens, or what there is room
    for if that is less or None too. The others are those of `Request`."""

    max_tokens: int | None
    default_tokens: int | None
    num_logprobs: int | None
    prompt_logprobs: bool = False
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """requests: for the engine, all choices of the first prompt first. n: choices per prompt. seed: of the first choice
    of each prompt; the following have the numbers after it."""

    id: str
    created: int
    requests: tuple[Request, ...]
    n: int
    seed: int
    stream: bool
    include_usage: bool


def make_plan(served: Served, caller: Caller, body: Common, prompts: Prompts, wanted: Wanted) -> Plan:
    """The requests. Raises ApiError or RequestError, with the field that is to blame."""
    n = 1 if body.n is None else body.n
    if not 1 <= n <= MAX_N:
        raise invalid("n", f"expected 1 to {MAX_N} choices, got {n}")
    most = served.bounds.max_choices
    if len(prompts.tokens) * n > most:
        raise invalid(prompts.field, f"expected at most {most} answers, got {len(prompts.tokens)} prompts with n={n}")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "only means something with stream=true; set that, or leave it out")
    seed = secrets.randbits(32) if body.seed is None else body.seed
    common = _common(served, caller, body, wanted)
    sampling = _sampling(served, body, seed)
    requests: list[Request] = []
    for tokens in prompts.tokens:
        max_tokens = _max_tokens(served, prompts, tokens, wanted)
        for choice in range(n):
            drawn = replace(sampling, seed=seed + choice)
            id = f"{caller.id}-{len(requests)}"
            requests.append(replace(common, id=id, prompt=tokens, max_tokens=max_tokens, sampling=drawn))
    return Plan(
        id=caller.id,
        created=int(time.time()),
        requests=tuple(requests),
        n=n,
        seed=seed,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def check_model(served: Served, model: str | None) -> None:
    """Raise ApiError 404 for a model that is not the one served."""
    if model is not None and model != served.name:
        raise ApiError(
            404, f"model: there is no {model[:200]!r} here; expected {served.name!r}", "model", "model_not_found"
        )


def check_tokens(served: Served, field: str, tokens: tuple[int, ...]) -> None:
    """Raise ApiError for ids that are none of the tokenizer's."""
    size = served.tokenizer.vocab_size
    wrong = next((id for id in tokens if not 0 <= id < size), None)
    if wrong is not None:
        raise invalid(field, f"expected token ids from 0 to {size - 1}, got {wrong}")


def _max_tokens(served: Served, prompts: Prompts, tokens: tuple[int, ...], wanted: Wanted) -> int:
    room, code = served.max_tokens - len(tokens), "context_length_exceeded"
    least = 0 if wanted.prompt_logprobs and wanted.max_tokens == 0 else 1
    if room < least:
        raise invalid(
            prompts.field,
            f"{len(tokens)} tokens leave no room for an answer, the model reads {served.max_tokens} tokens of prompt "
            "and answer together; shorten it",
            code,
        )
    if wanted.max_tokens is None:
        return room if wanted.default_tokens is None else min(wanted.default_tokens, room)
    if wanted.max_tokens < least:
        raise invalid("max_tokens", f"expected at least {least}, got {wanted.max_tokens}")
    if wanted.max_tokens > room:
        raise invalid(
            "max_tokens",
            f"the prompt has {len(tokens)} tokens and the model reads {served.max_tokens} of prompt and answer "
            f"together; expected at most {room}, got {wanted.max_tokens}",
            code,
        )
    return wanted.max_tokens


def _common(served: Served, caller: Caller, body: Common, wanted: Wanted) -> Request:
    """What all requests have; prompt, max_tokens and seed are filled in later."""
    stops = (body.stop,) if isinstance(body.stop, str) else body.stop or ()
    most = MAX_STOPS - len(wanted.stops)
    if len(stops) > most or not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise invalid("stop", f"expected at most {most} texts of 1 to {MAX_STOP_CHARACTERS} characters")
    stop_ids = body.stop_token_ids or ()
    if len(stop_ids) > MAX_STOP_IDS:
        raise invalid("stop_token_ids", f"expected at most {MAX_STOP_IDS} ids, got {len(stop_ids)}")
    check_tokens(served, "stop_token_ids", stop_ids)
    extension = body.equipoise
    return Request(
        id=caller.id,
        prompt=(served.tokenizer.eot_id,),
        max_tokens=1,
        stop=(*stops, *wanted.stops),
        stop_ids=frozenset(stop_ids if body.ignore_eos else (*stop_ids, served.tokenizer.eot_id)),
        num_logprobs=wanted.num_logprobs,
        prompt_logprobs=wanted.prompt_logprobs,
        routed_experts=bool(extension and extension.return_routed_experts),
        client=caller.client if body.user is None else f"user {body.user}",
        deadline=_deadline(caller, extension.deadline_ms if extension else None, served.bounds.answer_seconds),
    )


def _deadline(caller: Caller, milliseconds: float | None, most: float | None) -> float | None:
    """The request's own, or the server's if that is sooner. most: seconds."""
    if milliseconds is not None and not milliseconds > 0:
        raise invalid("equipoise.deadline_ms", f"expected more than 0 milliseconds, got {milliseconds:g}")
    allowed = [seconds for seconds in (None if milliseconds is None else milliseconds / 1000, most) if seconds]
    return caller.arrived + min(allowed) if allowed else None


def _sampling(served: Served, body: Common, seed: int) -> Sampling:
    given = {
        name: value
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        if (value := getattr(body, name)) is not None
    }
    top_k = None if body.top_k in (0, -1) else body.top_k
    return Sampling(top_k=top_k, logit_bias=_biases(served, body), seed=seed, **given)


def _biases(served: Served, body: Common) -> dict[int, float]:
    given = body.logit_bias or {}
    if len(given) > MAX_BIASES:
        raise invalid("logit_bias", f"expected at most {MAX_BIASES} tokens, got {len(given)}")
    wrong = next((key for key in given if not (key.isascii() and key.isdigit() and len(key) < 10)), None)
    if wrong is not None:
        raise invalid("logit_bias", f"expected token ids as keys, such as '42', got {wrong[:40]!r}")
    biases = {int(key): value for key, value in given.items()}
    check_tokens(served, "logit_bias", tuple(biases))
    return biases
