"""What the API asks others for with each response, made safe: whoever fails to say must not take the answer with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from equipoise.serve.api.errors import log
from equipoise.serve.api.served import Served

T = TypeVar("T")


def steady(served: Served) -> Served:
    """The same, but `degraded` and `retry_after` always answer: with nothing, or a second, where they fail."""
    return replace(
        served,
        degraded=_or_else("degraded", served.degraded, ()),
        retry_after=_or_else("retry_after", served.retry_after, 1.0),
    )


def _or_else(name: str, ask: Callable[[], T], otherwise: T) -> Callable[[], T]:
    """The first failure is logged, and the first after each success."""
    failing = False

    def asked() -> T:
        nonlocal failing
        try:
            answer = ask()
        except Exception:
            if not failing:
                log.exception("%s() failed; responses go without it until it works again", name)
            failing = True
            return otherwise
        failing = False
        return answer

    return asked
