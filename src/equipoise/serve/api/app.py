"""The application: routes from the table of endpoints, and errors in OpenAI's form for whatever is not in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from equipoise.serve.api.conversation import Receive, Scope, Send, converse
from equipoise.serve.api.endpoints import ENDPOINTS, Endpoint, Reply
from equipoise.serve.api.errors import ApiError
from equipoise.serve.api.served import Served
from equipoise.serve.api.steady import steady

if TYPE_CHECKING:
    from starlette.applications import Starlette


def create_app(served: Served, endpoints: Sequence[Endpoint] = ENDPOINTS) -> Starlette:
    """The public API for one model, or other endpoints, as an ASGI application. Raises ImportError without the extra,
    ValueError for a chat template that is none."""
    try:
        import pydantic_core  # noqa: F401 - reads what clients send
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route
    except ImportError as error:
        raise ImportError(
            "the API needs Starlette and pydantic, which are not installed; pip install 'equipoise[serve]'"
        ) from error
    served.template.check()
    served = steady(served)
    routes = [
        Route(each.path.replace("}", ":path}"), Conversations(served, each), methods=[each.method])
        for each in endpoints
    ]

    async def nowhere(request: Any, error: Any) -> Any:
        return _nowhere(served, error)

    app = Starlette(routes=routes, exception_handlers={HTTPException: nowhere})
    app.router.redirect_slashes = False
    return app


class Conversations:
    """One endpoint as an ASGI application."""

    def __init__(self, served: Served, endpoint: Endpoint) -> None:
        self._served, self._endpoint = served, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await converse(self._served, self._endpoint, scope, receive, send)


def _nowhere(served: Served, error: Any) -> Conversations:
    """The answer to a path or a method that is none of ours: 404 or 405."""

    async def refuse(served: Served, call: object) -> Reply:
        told = {404: "there is no such path here", 405: "this path does not take this method"}
        message = told.get(error.status_code, str(error.detail))
        raise ApiError(error.status_code, f"{message}; see /openapi.json", None, "unknown_url", error.headers or {})

    return Conversations(served, Endpoint("GET", "other", "", refuse, None, open=True))
