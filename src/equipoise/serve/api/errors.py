"""Errors as clients of OpenAI's API know them: a status, and an object with message, type, param and code."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from typing_extensions import TypedDict  # that of typing has no schema before Python 3.12

from equipoise.serve.engine import OverloadedError
from equipoise.serve.loop import DrainingError, StoppedError
from equipoise.serve.request import RequestError

log = logging.getLogger("equipoise.serve")
_TYPES = {429: "rate_limit_error", 503: "service_unavailable_error"}


class ErrorFields(TypedDict):
    """What went wrong. param: the field of the request that is to blame. code: for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """An error, in OpenAI's form."""

    error: ErrorFields


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is an error."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> ErrorBody:
        """The JSON of it."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str, message: str, code: str | None = "invalid_value") -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, f"{param}: {message}", param, code)


def unsupported(param: str, message: str) -> ApiError:
    """A 400 for what OpenAI's API has and this server doesn't."""
    return invalid(param, message, "unsupported_parameter")


def api_error(error: Exception, request_id: str, retry_after: float) -> ApiError:
    """The answer that an exception becomes. What is not the client's business goes to the log."""
    wait = {"retry-after": str(max(1, math.ceil(retry_after)))}
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), error.param, "invalid_value")
        case OverloadedError():
            return ApiError(429, f"{error}; try again later", None, "rate_limit_exceeded", wait)
        case DrainingError():
            return ApiError(503, str(error), None, "draining", wait)
        case StoppedError():
            log.error("request %s: %s", request_id, error)
            return ApiError(503, "the engine has stopped; the server's log says why", None, "stopped", wait)
    log.error("request %s failed", request_id, exc_info=error)
    return ApiError(
        500, f"something went wrong here; the server's log has it as request {request_id}", None, "internal"
    )
