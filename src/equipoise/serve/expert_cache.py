"""The numbers of experts that are read from a file, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from equipoise.small import CacheCounts

_COUNTERS = {
    "hits": "Experts that were in memory when tokens came to them.",
    "misses": "Experts that had to be read first.",
    "late": "Experts that were being read ahead when tokens came to them.",
    "evicted": "Experts that had to make room.",
    "prefetched": "Experts that were read ahead.",
    "used": "Experts that were read ahead, and then used.",
    "wasted": "Experts that were read ahead, and had to make room unused.",
    "failed": "Reads ahead that failed.",
    "bytes_read": "Bytes of experts read from the file.",
}
_GAUGES = {"bytes_held": "Bytes of experts in memory.", "most_bytes": "Bytes of experts that were in memory at most."}


class ExpertCacheCollector:
    """Asks for the counts whenever it is asked: `equipoise_serve_expert_cache_hits_total` and so on."""

    def __init__(self, counts: Callable[[], CacheCounts]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Any]:
        """One family per number."""
        core, counts = import_module("prometheus_client.core"), self._counts()
        for name, told in _COUNTERS.items():
            yield core.CounterMetricFamily(_full(name), told, value=getattr(counts, name))
        for name, told in _GAUGES.items():
            yield core.GaugeMetricFamily(_full(name), told, value=getattr(counts, name))

    def describe(self) -> list[Any]:
        """Nothing beforehand."""
        return []


def _full(name: str) -> str:
    return f"equipoise_serve_expert_cache_{name}"
