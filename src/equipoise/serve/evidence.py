"""What `equipoise triage ADDRESS` asks a server for: its records, as far as they fit, and its own word of how it is."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from equipoise.monitor.evidence import Evidence, Serving, evidence_of
from equipoise.monitor.evidence_http import PATH
from equipoise.monitor.evidence_wire import to_json
from equipoise.monitor.store import RunStore, StoreError
from equipoise.serve.api.endpoints import Call, Endpoint, Reply
from equipoise.serve.api.errors import ApiError
from equipoise.serve.api.health import not_ready
from equipoise.serve.api.served import Served
from equipoise.serve.operator import Operator

MOST_BYTES = 2_000_000  # about; what is old is thinned out
BUSY_S = 2.0  # that a reader waits for the writer


class Witness:
    """Gives evidence, to one at a time. folder: of the server's records."""

    def __init__(self, operator: Operator, folder: Path, max_waiting: int, admin_port: int | None) -> None:
        self._operator, self._folder = operator, folder.resolve()
        self._max_waiting, self._admin_port = max_waiting, admin_port
        self._one = asyncio.Lock()

    @property
    def endpoint(self) -> Endpoint:
        """Where it is asked."""
        told = "Records and state, for triage"
        return Endpoint("GET", PATH, told, self._give, dict[str, Any], None, (401, 500, 503))

    async def _give(self, served: Served, call: Call) -> Reply:
        async with self._one:
            return Reply(
                await asyncio.to_thread(lambda: to_json(replace(self._records(), serving=self._state(served))))
            )

    def _records(self) -> Evidence:
        try:
            with RunStore.open_readonly(self._folder, wait_s=BUSY_S) as store:
                return evidence_of(store, most_bytes=MOST_BYTES)
        except StoreError as error:
            raise ApiError(503, f"the server's records cannot be read: {error}", None, "no_records") from error

    def _state(self, served: Served) -> Serving:
        version = self._operator.weights.version
        return Serving(
            folder=str(self._folder),
            admin_port=self._admin_port,
            weights=version.source,
            version=version.number,
            acts=self._operator.acts,
            down=not_ready(served),
            degraded=served.degraded(),
            faults=self._operator.faults,
            num_open=served.loop.progress().num_open,
            max_waiting=self._max_waiting,
        )
