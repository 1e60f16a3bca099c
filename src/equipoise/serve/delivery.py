"""How the delivery of alerts goes, for Prometheus and for operators. Delivering is the sinks' business, in threads.

A pager that cannot be reached is no reason to mark answers as degraded; it is one for somebody to look.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib import import_module
from typing import Any

from equipoise.monitor.sinks.background import Background
from equipoise.types import Sink


def queues_of(sinks: Iterable[Sink]) -> tuple[Background, ...]:
    """Those behind a queue, which have a state to show."""
    return tuple(sink for sink in sinks if isinstance(sink, Background))


def delivery_state(queues: Iterable[Background]) -> dict[str, dict[str, Any]]:
    """By destination, as JSON."""
    return {queue.name: asdict(queue.state) for queue in queues}


class DeliveryCollector:
    """`equipoise_serve_alerts_handled_total{to="pagerduty"}` and so on."""

    def __init__(self, queues: Iterable[Background]) -> None:
        self._queues = tuple(queues)

    def collect(self) -> Iterator[Any]:
        """One family per number."""
        core = import_module("prometheus_client.core")
        name, states = "equipoise_serve_alerts_{}".format, {queue.name: queue.state for queue in self._queues}
        pending = core.GaugeMetricFamily(name("pending"), "Records that wait for a destination.", labels=["to"])
        handled = core.CounterMetricFamily(name("handled"), "Records that a destination has taken.", labels=["to"])
        failed = core.CounterMetricFamily(name("failed"), "Records refused, after all tries.", labels=["to"])
        dropped = core.CounterMetricFamily(name("dropped"), "Records that found no room.", labels=["to", "kind"])
        for to, state in states.items():
            pending.add_metric([to], state.pending)
            handled.add_metric([to], state.handled)
            failed.add_metric([to], state.errors)
            for kind, number in state.dropped.items():
                dropped.add_metric([to, kind], number)
        yield from (pending, handled, failed, dropped)

    def describe(self) -> list[Any]:
        """Nothing beforehand."""
        return []
