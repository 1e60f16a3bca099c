"""What uvicorn does not do by itself: give up on a connection whose request does not arrive, in time and in bounds.

It has a time limit between requests, and none for a head that never ends, nor for a connection that says nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from equipoise.serve.api.served import Bounds

if TYPE_CHECKING:
    import uvicorn


def uvicorn_config(app: Any, bounds: Bounds, **options: Any) -> uvicorn.Config:
    """uvicorn's configuration for an application that strangers reach. options: uvicorn's, such as host and port.

    Raises ImportError without the extra.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError("serving needs uvicorn, which is not installed; pip install 'equipoise[serve]'") from error
    careful: dict[str, Any] = {
        "http": patient_protocol(bounds),
        "ws": "none",
        "lifespan": "off",
        "access_log": False,
        "log_level": "warning",
        "proxy_headers": False,  # whoever connects could claim to be anybody
        "server_header": False,
        "timeout_keep_alive": bounds.keep_alive_seconds,
    }
    return uvicorn.Config(app, **(careful | options))


def patient_protocol(bounds: Bounds, base: type[asyncio.Protocol] | None = None) -> type[asyncio.Protocol]:
    """uvicorn's protocol, with bounds on how long a request's head may take and how long it may be.

    base: one of uvicorn's two, None for the one that it chooses itself.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    return type("PatientProtocol", (_Patient, base or AutoHTTPProtocol), {"_bounds": bounds})


class _Patient:
    """A connection, before uvicorn's class for one. The clock runs from its beginning, or a request's first byte, until
    the request's head is complete."""

    _bounds: Bounds
    _timer: asyncio.TimerHandle | None = None
    _num_bytes = 0
    cycle: Any  # uvicorn's: the request that is being answered, or was last
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)  # type: ignore[misc]
        self._start()

    def data_received(self, data: bytes) -> None:
        if self._timer is None and not self._answering:
            self._start()
        super().data_received(data)  # type: ignore[misc]
        if self._answering or self._became_a_websocket:
            self._stop()
            return
        self._num_bytes += len(data)
        if self._num_bytes > self._bounds.max_head:
            self._give_up()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop()
        super().connection_lost(error)  # type: ignore[misc]

    @property
    def _answering(self) -> bool:
        """Whether a request's head is complete and its response is not."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _became_a_websocket(self) -> bool:
        """Whether the connection now belongs to another protocol."""
        owner: object = self.transport.get_protocol()
        return owner is not self

    def _start(self) -> None:
        self._num_bytes = 0
        self._timer = asyncio.get_running_loop().call_later(self._bounds.header_seconds, self._give_up)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._stop()
        self.transport.abort()
