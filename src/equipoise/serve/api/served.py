"""What the API needs to serve one model, in one frozen record, and what it tells whoever counts requests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from equipoise.models.tokenizers import AnyTokenizer
from equipoise.serve.api.template import BUILT_IN, ChatTemplate
from equipoise.serve.loop import EngineLoop

GONE = 499  # as nginx counts a client that went away before its answer


@dataclass(frozen=True)
class Counted:
    """One request that has ended. Times are in seconds.

    endpoint: its path in the API, or "other". status: of the response; 499 when the client went away, 500 or 503 also
    when a stream that had begun with 200 broke. prompt_tokens, cached_tokens, answer_tokens: as in the usage, and of a
    broken request what was computed. first_token: from the request's arrival to its first token, None without tokens.
    between_tokens: from one token to the next, all choices. finishes: why its choices ended. degraded: the reasons that
    the response was marked with.
    """

    endpoint: str
    status: int
    seconds: float
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    first_token: float | None = None
    between_tokens: tuple[float, ...] = ()
    finishes: tuple[str, ...] = ()
    degraded: tuple[str, ...] = ()


class Counting(Protocol):
    """Told about each request when it has ended, in the event loop's thread: it must be quick."""

    def __call__(self, counted: Counted, /) -> None: ...  # noqa: D102 - said above


def _no_reason() -> tuple[str, ...]:
    return ()


def _a_second() -> float:
    return 1.0


def _not_counted(counted: Counted, /) -> None:
    return None


@dataclass(frozen=True)
class Bounds:
    """What one client may take. max_body: bytes of a request. max_choices: answers that one request may ask for.

    body_seconds: in which a request's body must arrive. write_seconds: in which a client must take what is sent to it.
    header_seconds: in which a request's head must arrive. max_head: bytes of it. keep_alive_seconds: between a
    connection's requests. stall_seconds: without progress, while there is work, after which the server is not alive.
    answer_seconds: from a request's arrival, after which its answer ends as it is; None for no end. A request may ask
    for less. ping_seconds: of silence, after which a stream says that it is still there, so that no proxy cuts it.
    Raises ValueError for one of the two that is not more than 0.
    """

    max_body: int = 2**20
    max_choices: int = 128
    body_seconds: float = 20.0
    write_seconds: float = 60.0
    header_seconds: float = 10.0
    max_head: int = 2**16
    keep_alive_seconds: int = 30
    stall_seconds: float = 60.0
    answer_seconds: float | None = None
    ping_seconds: float = 15.0

    def __post_init__(self) -> None:
        for name in ("answer_seconds", "ping_seconds"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"Bounds.{name}: expected seconds, more than 0, got {seconds}")


@dataclass(frozen=True)
class Served:
    """One model and its engine, as the API sees them.

    max_tokens: of prompt and answer together. created: unix seconds. layers: names of the MoE layers, in the order of
    `Output.experts`. degraded: why answers may be worse than usual, empty when they are not. retry_after: in how many
    seconds one who was refused may try again. keys: whoever has one of them may ask; empty for everybody.
    """

    name: str
    loop: EngineLoop
    tokenizer: AnyTokenizer
    max_tokens: int
    created: int
    layers: tuple[str, ...] = ()
    template: ChatTemplate = BUILT_IN
    degraded: Callable[[], tuple[str, ...]] = _no_reason
    retry_after: Callable[[], float] = _a_second
    count: Counting = _not_counted
    keys: tuple[str, ...] = field(default=(), repr=False)
    bounds: Bounds = Bounds()
