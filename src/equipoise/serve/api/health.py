"""Is it alive, is it ready, is it well: three questions, answered by what the engine does, not by a flag."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict  # that of typing has no schema before Python 3.12

from equipoise.serve.api.errors import ApiError
from equipoise.serve.api.served import Served


class HealthBody(TypedDict):
    """status: ok; degraded, answers may be worse than usual; down, there will be none. reasons: why. num_steps: of the
    engine so far. seconds_without_progress: while there is work. num_open: requests."""

    status: Literal["ok", "degraded", "down"]
    reasons: list[str]
    num_steps: int
    seconds_without_progress: float
    num_open: int


def dead(served: Served) -> str:
    """Why the process should be replaced; empty when it should not."""
    progress = served.loop.progress()
    if progress.error:
        return "the engine's thread has ended with an error; the server's log has it"
    if served.loop.state == "ended":
        return "the engine's thread has ended"
    if progress.seconds > served.bounds.stall_seconds:
        return (
            f"{progress.num_open} requests are open, and the engine has made no progress for {progress.seconds:.0f} s"
        )
    return ""


def not_ready(served: Served) -> str:
    """Why it should not be sent requests; empty when it may be."""
    if reason := dead(served):
        return reason
    if served.loop.state == "new":
        return "the engine has not been started"
    return "the server is shutting down" if served.loop.draining else ""


def health(served: Served) -> tuple[int, HealthBody]:
    """Status and body of GET /health."""
    progress, reason = served.loop.progress(), not_ready(served)
    reasons = [reason] if reason else list(served.degraded())
    body: HealthBody = {
        "status": "down" if reason else "degraded" if reasons else "ok",
        "reasons": reasons,
        "num_steps": progress.num_steps,
        "seconds_without_progress": round(progress.seconds, 3),
        "num_open": progress.num_open,
    }
    return (503 if reason else 200), body


def answer(reason: str) -> dict[str, str]:
    """The body of a probe. Raises ApiError 503, with the reason, if there is one."""
    if reason:
        raise ApiError(503, reason, None, "not_ready")
    return {"status": "ok"}
