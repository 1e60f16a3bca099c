"""The collector: makes metrics of a source's newest picture at each scrape, within a budget of series.

The protocol is prometheus_client's: an object with `collect`, registered in a registry of the caller's choice. There
is no global state, and no object per series.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, get_args

from equipoise.monitor.baseline import Baseline
from equipoise.monitor.prometheus import families
from equipoise.monitor.prometheus.source import Source

if TYPE_CHECKING:
    from prometheus_client.core import Metric

Detail = Literal["summary", "layer", "expert"]
MAX_SERIES, LEAST_SERIES = 10_000, 100
_DETAIL_SERIES = 4  # what detail_families adds


class RoutingCollector:
    """Exports a source.

    detail: "summary" is about the run as a whole, some 40 series; "layer" adds about 25 for each layer; "expert" adds
    one for each expert of each layer. Each level has what the ones before it have, under the same names.
    max_series: budget. A level that doesn't fit is left out whole: expert falls back to layer, layer to summary. The
    gauge equipoise_series_dropped says how many series are missing, equipoise_detail_info which level there is. Alerts
    come before layers; where even they don't fit, the least severe ones are left out.
    baselines: layers in health, for rules that compare the logits with them.
    Raises ValueError for another level, or a budget below 100; ImportError, naming the extra, at the first scrape
    without prometheus_client.
    """

    def __init__(
        self,
        source: Source,
        *,
        detail: Detail = "layer",
        max_series: int = MAX_SERIES,
        baselines: Mapping[str, Baseline] | None = None,
    ) -> None:
        if detail not in get_args(Detail):
            raise ValueError(f"detail: expected summary, layer or expert, got {detail!r}")
        if max_series < LEAST_SERIES:
            raise ValueError(
                f"max_series: expected at least {LEAST_SERIES}, which the summary needs, got {max_series}; raise it"
            )
        self._source, self._detail, self._max_series = source, detail, max_series
        self._baselines = dict(baselines or {})
        self._lock = threading.Lock()
        self._seconds = 0.0

    def collect(self) -> Iterator[Metric]:
        """The metric families of now. May be called from several threads at once."""
        begin = time.perf_counter()
        snapshot = self._source.read()
        seconds = {**snapshot.seconds, "collect": self._seconds}  # of the scrapes before this one
        found = families.run_families(snapshot) + families.cost_families(snapshot.run, seconds)
        found += families.alert_families(snapshot)
        room, dropped = self._max_series - _DETAIL_SERIES, 0
        for family in found:
            room, dropped = room - len(family.samples), dropped + _cut(family, room)
        room, effective = max(room, 0), "summary"
        if self._detail != "summary":
            layers = families.layer_families(snapshot, self._baselines)
            needed = sum(len(family.samples) for family in layers)
            if fits := needed <= room:
                found, room, effective = found + layers, room - needed, "layer"
            dropped += 0 if fits else needed
        if self._detail == "expert":
            needed = families.num_expert_series(snapshot)
            if fits := effective == "layer" and needed <= room:
                found, room, effective = found + families.expert_families(snapshot), room - needed, "expert"
            dropped += 0 if fits else needed
        series = (self._max_series - room, dropped, self._max_series)
        found += families.detail_families(snapshot.run, self._detail, effective, series)
        with self._lock:
            self._seconds += time.perf_counter() - begin
        yield from found


def _cut(family: Metric, room: int) -> int:
    """Leave at most `room` samples in the family; returns how many had to go."""
    excess = max(len(family.samples) - max(room, 0), 0)
    del family.samples[len(family.samples) - excess :]
    return excess
