"""POST /v1/completions: continue texts, or score them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import (
    NotRequired,  # that of typing has no schema before Python 3.12
    cast,
)

from typing_extensions import TypedDict

from equipoise.serve.api.answer import Extra, Form
from equipoise.serve.api.bodies import CompletionBody
from equipoise.serve.api.errors import invalid, unsupported
from equipoise.serve.api.plan import Caller, Plan, Prompts, Wanted, check_model, check_tokens, make_plan
from equipoise.serve.api.read import read
from equipoise.serve.api.served import Served
from equipoise.serve.api.tally import Usage
from equipoise.serve.api.tokens import Offsets, alternatives, encode_prompt, finite, name_of
from equipoise.serve.request import Logprob, Output

DEFAULT_TOKENS = 16


class Logprobs(TypedDict):
    """Of each token: its text, ln p, the likeliest others, and where it begins in the choice's text. A prompt's first
    token has no ln p."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One answer, or a piece of one."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: str | None


class CompletionChunk(TypedDict):
    """A piece of it. usage: where it is asked for. equipoise: in the last one."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]
    equipoise: NotRequired[Extra]


class Completion(TypedDict):
    """What comes back in one piece."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    equipoise: Extra


def plan_completions(served: Served, caller: Caller, raw: bytes) -> tuple[Plan, Form]:
    """What to compute and how to write it. Raises ApiError or RequestError."""
    body = read(CompletionBody, raw)
    check_model(served, body.model)
    n = 1 if body.n is None else body.n
    if body.best_of not in (None, n):
        raise unsupported("best_of", f"expected n = {n}, or none, got {body.best_of}; choose among n answers yourself")
    if body.suffix:
        raise unsupported("suffix", "this server continues texts and does not fill gaps; leave it out")
    prompts = Prompts(_prompts(served, body.prompt), "prompt")
    echo = bool(body.echo)
    wanted = Wanted(
        max_tokens=body.max_tokens,
        default_tokens=DEFAULT_TOKENS,
        num_logprobs=body.logprobs,
        prompt_logprobs=echo and (body.logprobs is not None or body.max_tokens == 0),
    )
    plan = make_plan(served, caller, body, prompts, wanted)
    writers = [
        CompletionWriter(served, index, request.prompt, echo, body.logprobs)
        for index, request in enumerate(plan.requests)
    ]
    at_once = wanted.prompt_logprobs  # they are known at the end
    return plan, Form("text_completion", "text_completion", writers, at_once)


def _prompts(
    served: Served, given: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """The tokens of each."""
    one = isinstance(given, str) or (given and isinstance(given[0], int))
    prompts = cast("list[str | Sequence[int]]", [given] if one else list(given))
    if not prompts:
        raise invalid("prompt", "expected at least one, got an empty list")
    if len(prompts) > served.bounds.max_choices:
        raise invalid("prompt", f"expected at most {served.bounds.max_choices} prompts, got {len(prompts)}")
    return tuple(_tokens(served, prompt) for prompt in prompts)


def _tokens(served: Served, prompt: str | Sequence[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return tuple(encode_prompt(served.tokenizer, prompt)) or (served.tokenizer.eot_id,)
    if not prompt:
        raise invalid("prompt", "expected at least one token id, got none; an empty text begins a document")
    check_tokens(served, "prompt", tuple(prompt))
    return tuple(prompt)


class CompletionWriter:
    """Of one choice. echo: its text begins with the prompt's."""

    def __init__(self, served: Served, index: int, prompt: Sequence[int], echo: bool, num_logprobs: int | None) -> None:
        self._tokenizer, self._index = served.tokenizer, index
        self._prompt = tuple(prompt) if echo else ()
        self._with_logprobs = num_logprobs is not None
        self._offsets = Offsets(served.tokenizer)
        self._begun = False

    def whole(self, answer: Output) -> CompletionChoice:
        """The same as one piece."""
        text = answer.text if self._begun else self._tokenizer.decode(self._prompt) + answer.text
        return {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs(answer) if self._with_logprobs else None,
            "finish_reason": answer.finish,
        }

    def pieces(self, piece: Output) -> list[CompletionChoice]:
        """One choice, or none while there is nothing to say."""
        choice = self.whole(piece)
        self._begun = True
        says = choice["text"] or choice["finish_reason"] or (choice["logprobs"] and choice["logprobs"]["tokens"])
        return [choice] if says else []

    def _logprobs(self, answer: Output) -> Logprobs:
        prompt: Sequence[Logprob | None] = answer.prompt_logprobs or () if self._prompt else ()
        ids = [*(self._prompt if prompt else ()), *(logprob.id for logprob in answer.logprobs)]
        each = [*prompt, *answer.logprobs]
        return {
            "tokens": [name_of(self._tokenizer, id) for id in ids],
            "token_logprobs": [None if logprob is None else finite(logprob.logprob) for logprob in each],
            "top_logprobs": [None if logprob is None else self._top(logprob) for logprob in each],
            "text_offset": [self._offsets.next(id) for id in ids],
        }

    def _top(self, logprob: Logprob) -> dict[str, float]:
        return {name_of(self._tokenizer, id): finite(value) for id, value in alternatives(logprob)}
