"""POST /v1/chat/completions: answer conversations."""

from __future__ import annotations

from typing import NotRequired  # that of typing has no schema before Python 3.12

from typing_extensions import TypedDict

from equipoise.serve.api.answer import Extra, Form
from equipoise.serve.api.bodies import ROLES, ChatBody, Message
from equipoise.serve.api.errors import invalid, unsupported
from equipoise.serve.api.plan import Caller, Plan, Prompts, Wanted, check_model, make_plan
from equipoise.serve.api.read import read
from equipoise.serve.api.served import Served
from equipoise.serve.api.tally import Usage
from equipoise.serve.api.template import Control, TemplateRefusedError
from equipoise.serve.api.tokens import bytes_of, encode, finite, id_of, name_of
from equipoise.serve.request import Logprob, Output


class TopLogprob(TypedDict):
    """A token and its ln p. bytes: None for the end of a document."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """One that was chosen, with the likeliest ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Of the tokens of an answer."""

    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(TypedDict):
    """What the model says."""

    role: str
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class Delta(TypedDict, total=False):
    """What is new of an answer."""

    role: str
    content: str


class DeltaChoice(TypedDict):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunk(TypedDict):
    """A piece of it. usage: where it is asked for. equipoise: in the last one."""

    id: str
    object: str
    created: int
    model: str
    choices: list[DeltaChoice]
    usage: NotRequired[Usage | None]
    equipoise: NotRequired[Extra]


class ChatCompletion(TypedDict):
    """What comes back in one piece."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    equipoise: Extra


def plan_chat(served: Served, caller: Caller, raw: bytes) -> tuple[Plan, Form]:
    """What to compute and how to write it. Raises ApiError or RequestError."""
    body = read(ChatBody, raw)
    check_model(served, body.model)
    _check_supported(body)
    messages = [_plain(message, f"messages[{number}]") for number, message in enumerate(body.messages)]
    if not messages:
        raise invalid("messages", "expected at least one, got an empty list")
    try:
        pieces = served.template.render(messages)
    except TemplateRefusedError as error:
        raise invalid("messages", str(error)) from error
    tokens: list[int] = []
    for piece in pieces:
        if isinstance(piece, Control):
            tokens.append(id_of(served.tokenizer, piece))
        else:
            tokens += encode(served.tokenizer, "messages", piece)
    wanted = Wanted(
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        default_tokens=None,
        num_logprobs=_num_logprobs(body),
        stops=served.template.stops,
    )
    prompts = Prompts((tuple(tokens) or (served.tokenizer.eot_id,),), "messages")
    plan = make_plan(served, caller, body, prompts, wanted)
    writers = [ChatWriter(served, index, wanted.num_logprobs is not None) for index in range(len(plan.requests))]
    return plan, Form("chat.completion", "chat.completion.chunk", writers)


def _check_supported(body: ChatBody) -> None:
    """Raise ApiError for what would have to be ignored, though the answer depends on it."""
    for name in ("tools", "functions", "audio"):
        if getattr(body, name):
            raise unsupported(name, f"this server does not support {name}; leave them out")
    for name in ("tool_choice", "function_call"):
        if getattr(body, name) not in (None, "none", "auto"):
            raise unsupported(name, "this server does not support tools; leave it out")
    if body.response_format is not None and body.response_format.type != "text":
        raise unsupported("response_format", "this server does not support any but type 'text'; leave it out")
    if any(modality != "text" for modality in body.modalities or ()):
        raise unsupported("modalities", "this server does not support any but 'text'; leave it out")


def _plain(message: Message, place: str) -> dict[str, str]:
    """Role and text."""
    if message.role in ("tool", "function") or message.tool_calls or message.function_call:
        raise unsupported(place, "this server does not support tools; leave out such messages")
    if message.role not in ROLES:
        raise invalid(f"{place}.role", f"expected one of {', '.join(ROLES)}, got {message.role[:40]!r}")
    content = message.content
    if content is None:
        raise invalid(f"{place}.content", "expected a text or a list of text parts, got null")
    if isinstance(content, str):
        return {"role": message.role, "content": content}
    for number, part in enumerate(content):
        field = f"{place}.content[{number}]"
        if part.type != "text":
            raise unsupported(field, f"this server does not support parts of type {part.type[:40]!r}; send text")
        if part.text is None:
            raise invalid(field, "expected a text, got none")
    return {"role": message.role, "content": "".join(part.text or "" for part in content)}


def _num_logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise invalid("top_logprobs", "only means something with logprobs=true; set that, or leave it out")
    return None


class ChatWriter:
    """Of one choice."""

    def __init__(self, served: Served, index: int, with_logprobs: bool) -> None:
        self._tokenizer, self._index, self._with_logprobs = served.tokenizer, index, with_logprobs
        self._begun = False

    def whole(self, answer: Output) -> ChatChoice:
        """With the whole message."""
        return {
            "index": self._index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer),
            "finish_reason": answer.finish,
        }

    def pieces(self, piece: Output) -> list[DeltaChoice]:
        """The role first, then text, and a last one that says why it ended."""
        choices = []
        if not self._begun:
            choices.append(self._choice({"role": "assistant", "content": ""}))
            self._begun = True
        if piece.text or (self._with_logprobs and piece.logprobs):
            choices.append(self._choice({"content": piece.text}, self._logprobs(piece)))
        if piece.finish is not None:
            choices.append(self._choice({}, None, piece.finish))
        return choices

    def _choice(self, delta: Delta, logprobs: ChatLogprobs | None = None, finish: str | None = None) -> DeltaChoice:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, answer: Output) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        return {"content": [self._token(logprob) for logprob in answer.logprobs], "refusal": None}

    def _token(self, logprob: Logprob) -> TokenLogprob:
        top = [self._named(id, value) for id, value in logprob.top]
        return {**self._named(logprob.id, logprob.logprob), "top_logprobs": top}

    def _named(self, id: int, logprob: float) -> TopLogprob:
        return {
            "token": name_of(self._tokenizer, id),
            "logprob": finite(logprob),
            "bytes": bytes_of(self._tokenizer, id),
        }
