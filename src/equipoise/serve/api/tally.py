"""What one request has cost so far: tokens, and when they came."""

from __future__ import annotations

import time

from typing_extensions import TypedDict  # that of typing has no schema before Python 3.12

from equipoise.serve.api.plan import Plan
from equipoise.serve.api.served import Counted
from equipoise.serve.request import Output


class CachedTokens(TypedDict):
    """cached_tokens: of the prompts, those whose keys and values were there already."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens of prompts, each prompt once; of answers, with the token that ended each; and of both."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Tally:
    """Of one request; times are those of its pieces' arrival in the event loop."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._prompts: tuple[int, ...] = ()
        self._n = 1
        self._cached: dict[int, int] = {}
        self._answer_tokens = 0
        self._first: float | None = None
        self._last: dict[int, float] = {}
        self._between: list[float] = []
        self._finishes: list[str] = []

    def planned(self, plan: Plan) -> None:
        """These prompts are about to be computed."""
        self._prompts, self._n = tuple(len(each.prompt) for each in plan.requests[:: plan.n]), plan.n

    def piece(self, index: int, output: Output) -> None:
        """A piece of the choice with that index has come."""
        now = time.perf_counter()
        if output.token_ids:
            self._answer_tokens += len(output.token_ids)
            if self._first is None:
                self._first = now - self._began
            if index in self._last:
                self._between.append(now - self._last[index])
            self._last[index] = now
        if output.finish is not None:
            self._finishes.append(output.finish)
            self._cached[index] = output.num_cached

    @property
    def usage(self) -> Usage:
        """For the response. Of a prompt with several choices, the choice that found least in the cache counts."""
        begun = bool(self._last or self._finishes)
        prompt_tokens = sum(self._prompts) if begun else 0
        cached = sum(
            min((self._cached.get(choice, 0) for choice in range(first, first + self._n)), default=0)
            for first in range(0, len(self._prompts) * self._n, self._n)
        )
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._answer_tokens,
            "total_tokens": prompt_tokens + self._answer_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def counted(self, endpoint: str, status: int, degraded: tuple[str, ...]) -> Counted:
        """It has ended."""
        usage = self.usage
        return Counted(
            endpoint=endpoint,
            status=status,
            seconds=time.perf_counter() - self._began,
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            answer_tokens=usage["completion_tokens"],
            first_token=self._first,
            between_tokens=tuple(self._between),
            finishes=tuple(self._finishes),
            degraded=degraded,
        )
