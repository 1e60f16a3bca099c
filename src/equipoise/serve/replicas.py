"""One server of several behind Ray Serve: the same engine, care and API, in an actor; and the metrics of all of them.

Ray Serve's proxy has the socket, chooses the replica and keeps streams open. It does not know what a replica is about.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from equipoise.disk.atomic import atomic_write
from equipoise.serve.api.conversation import Receive, Scope, Send
from equipoise.serve.api.health import dead
from equipoise.serve.metrics import client, send_exposition
from equipoise.serve.server import Server, ServerConfig

METRICS, STALE_S = "metrics.prom", 30.0


class Door:
    """The application that Ray Serve is given: hands each request to the replica that it came to. It has no state."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":  # the replica's is Ray's affair
            for moment in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{moment}.complete"})
            return
        replica = import_module("ray.serve").get_replica_context().servable_object
        if scope["type"] == "http" and scope.get("path") == "/metrics":
            await replica.send_metrics(send)
        else:
            await replica.answer(scope, receive, send)


@dataclass(frozen=True)
class Weights:
    """What each replica loads. run: folder or checkpoint. dtype: see `dtype_of`. device: cpu or cuda."""

    run: Path
    dtype: str
    device: str


class Replica:
    """A whole server.

    config.folder: of all replicas' records; each has a folder in it, named by its id.
    """

    def __init__(self, weights: Weights, config: ServerConfig) -> None:
        from equipoise.models.dtypes import dtype_of
        from equipoise.models.run_files import load

        self.all, self.id = config.folder, import_module("ray.serve").get_replica_context().replica_id.unique_id
        loaded = load(weights.run, dtype=dtype_of(weights.dtype), device=weights.device)
        self.server = Server(loaded, replace(config, folder=self.all / self.id), os.environ)
        self.public = self.server.public_app()
        self.server.start()
        self.running = True
        self.check_health()

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request of the API."""
        await self.public(scope, receive, send)

    def check_health(self) -> None:
        """Asked by Ray every few seconds: raises RuntimeError, and is replaced, when it makes no progress.

        Whoever is healthy writes its metrics down.
        """
        if reason := dead(self.server.served):
            raise RuntimeError(reason)
        with atomic_write(self.all / self.id / METRICS) as file:
            file.write(self.server.metrics_text()[0])

    async def send_metrics(self, send: Send) -> None:
        """Of all replicas that are healthy, each with its id as a label."""
        await send_exposition(send, *await asyncio.to_thread(lambda: merged(_written(self.all))))

    def __del__(self) -> None:
        """Called by Ray when no request is open any more, or none may be."""
        if getattr(self, "running", False):
            self.running = False
            self.server.stop(0.0)
            (self.all / self.id / METRICS).unlink(missing_ok=True)


def _written(folder: Path) -> dict[str, str]:
    """What the replicas have written, by id; one that has not for a while is gone."""
    paths = [path for path in folder.glob(f"*/{METRICS}") if time.time() - path.stat().st_mtime < STALE_S]
    return {path.parent.name: path.read_text(encoding="utf-8") for path in sorted(paths)}


def merged(texts: Mapping[str, str]) -> tuple[bytes, str]:
    """(metrics of several, each sample with the label `replica`; content type). texts: of each, by id."""
    prometheus = client()
    parse = import_module("prometheus_client.parser").text_string_to_metric_families
    family = import_module("prometheus_client.core").Metric
    found: dict[str, Any] = {}
    for id, text in texts.items():
        for each in parse(text):
            whole = found.setdefault(each.name, family(each.name, each.documentation, each.type))
            for sample in each.samples:
                whole.add_sample(sample.name, {**sample.labels, "replica": id}, sample.value)

    class All:
        def describe(self) -> list[Any]:
            return []

        def collect(self) -> Iterator[Any]:
            return iter(found.values())

    registry = prometheus.CollectorRegistry()
    registry.register(All())
    return prometheus.generate_latest(registry), str(prometheus.CONTENT_TYPE_LATEST)
