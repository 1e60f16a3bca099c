"""A call posted to the thread that owns something: made there, its result or its error back to whoever asked."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


def fulfil(future: Future[Any], function: Callable[[], Any]) -> None:
    """Call the function, unless whoever asked no longer waits. Nothing that it raises reaches the caller of this."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:  # it belongs to whoever asked
        future.set_exception(error)
