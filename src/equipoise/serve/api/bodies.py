"""What clients send: the fields of each request and their types; ranges are checked later.

Fields that are not here are ignored, null is the default, and a value of another type is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """include_usage: a last chunk without choices says how many tokens there were."""

    include_usage: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Extension:
    """What this server can do besides. return_routed_experts: say which experts each token went to. deadline_ms: end
    the answer after so many milliseconds, whatever there is of it."""

    return_routed_experts: bool | None = None
    deadline_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Common:
    """What completions and chat have in common."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[str, float] | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    equipoise: Extension | None = None


@dataclass(frozen=True, kw_only=True)
class CompletionBody(Common):
    """Continue each prompt: a text, token ids, or a list of either. An empty text begins a document."""

    prompt: str | tuple[str, ...] | tuple[int, ...] | tuple[tuple[int, ...], ...]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


@dataclass(frozen=True, kw_only=True)
class ContentPart:
    """A piece of a message's content. Only those of type text can be read."""

    type: str
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str | tuple[ContentPart, ...] | None = None
    tool_calls: Any = None
    function_call: Any = None


@dataclass(frozen=True, kw_only=True)
class ResponseFormat:
    """Only text can be promised."""

    type: str


@dataclass(frozen=True, kw_only=True)
class ChatBody(Common):
    """Answer a conversation."""

    messages: tuple[Message, ...]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: ResponseFormat | None = None
    modalities: tuple[str, ...] | None = None
    audio: Any = None


@dataclass(frozen=True, kw_only=True)
class TokenizeBody:
    """Text to token ids."""

    prompt: str
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class DetokenizeBody:
    """Token ids to text."""

    tokens: tuple[int, ...]
    model: str | None = None


Role = Literal["system", "developer", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant")
