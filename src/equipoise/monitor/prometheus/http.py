"""Serves metrics over HTTP, with prometheus_client's own server. No authentication: so it listens on this machine only.

Put a reverse proxy in front of it, or an SSH tunnel, where Prometheus runs elsewhere.
"""

from __future__ import annotations

from importlib import import_module
from types import TracebackType
from typing import Any, Self

from equipoise.monitor.prometheus.collector import RoutingCollector
from equipoise.monitor.prometheus.families import core

PORT = 9469


class Exporter:
    """Serves what `collector` collects, in a thread, from now until `close`. Usable as a context manager.

    port: 0 takes a free one; `url` has it. address: another than 127.0.0.1 lets everyone who can reach it read names
    and numbers of the run. registry: where the collector is registered, to be served together with other collectors;
    None makes an empty one.
    Raises ValueError for a port that is taken, or that is none; ImportError, naming the extra, without
    prometheus_client.
    """

    def __init__(
        self, collector: RoutingCollector, *, port: int = PORT, address: str = "127.0.0.1", registry: Any = None
    ) -> None:
        if not 0 <= port <= 65535:
            raise ValueError(f"port: expected 0 to 65535, got {port}; 0 takes a free one")
        core()
        client = import_module("prometheus_client")
        self._registry = client.CollectorRegistry() if registry is None else registry
        self._collector = collector
        try:
            self._server, self._thread = client.start_http_server(port, address, self._registry)
        except OSError as error:
            raise ValueError(
                f"port: cannot listen on {address} port {port}: {error}; choose another, or 0 for a free one"
            ) from error
        self._registry.register(collector)
        self.port = int(self._server.server_port)
        host = f"[{address}]" if ":" in address else address
        self.url = f"http://{host}:{self.port}/metrics"
        self._closed = False

    def close(self) -> None:
        """Stop serving and free the port. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._registry.unregister(self._collector)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
