"""What an exporter reads: one consistent picture of a run, with totals that only ever grow.

Two sources make such pictures: live.py from a monitor in this process, run_folder.py from a run's file. This file has
what they share. It knows nothing of Prometheus.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from equipoise.types import DROP_REASONS, REROUTE_REASONS, Alert, Finding, RoutingStats


@dataclass(frozen=True, eq=False)
class LayerTotals:
    """One layer: its newest flush, and sums over all flushes. Frozen, so that readers need no lock.

    counts_E: int64 assignments per expert. num_tokens: routed. dropped, rerouted: by reason, see `RoutingStats`.
    """

    last: RoutingStats
    counts_E: np.ndarray
    num_tokens: int
    dropped: Mapping[str, int]
    rerouted: Mapping[str, int]

    @staticmethod
    def of(stats: RoutingStats) -> LayerTotals:
        """The totals after a first flush; reasons that have not occurred are there with 0."""
        return LayerTotals(
            last=stats,
            counts_E=np.array(stats.counts_E, dtype=np.int64),
            num_tokens=stats.num_tokens,
            dropped=dict.fromkeys(DROP_REASONS, 0) | dict(stats.dropped),
            rerouted=dict.fromkeys(REROUTE_REASONS, 0) | dict(stats.rerouted),
        )

    def plus(self, stats: RoutingStats) -> LayerTotals:
        """The totals after one more flush. A layer with another number of experts is another layer: it starts anew."""
        if stats.num_experts != len(self.counts_E):
            return LayerTotals.of(stats)
        return LayerTotals(
            last=stats,
            counts_E=self.counts_E + np.asarray(stats.counts_E, dtype=np.int64),
            num_tokens=self.num_tokens + stats.num_tokens,
            dropped=_sum(self.dropped, stats.dropped),
            rerouted=_sum(self.rerouted, stats.rerouted),
        )


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run at one moment.

    layers: in the order of the model. firing: alerts, oldest first. aftermath: findings that repairs have left as they
    were, which are no alerts. fired: how often alerts began to fire, by (rule,
    severity). actions: changes of repairs, by (kind, state). num_flushes, step: so far, and of the newest flush.
    flushed_at: seconds since 1970, None before the first flush or where it is not known. running: the run goes on.
    readable: False when the source could not be read and this is an older picture. seconds: what watching has cost, by
    part. num_ignored: layers, alerts or kinds beyond the most that a source keeps.
    """

    run: str
    layers: Mapping[str, LayerTotals] = field(default_factory=dict)
    firing: tuple[Alert, ...] = ()
    aftermath: tuple[Finding, ...] = ()
    fired: Mapping[tuple[str, str], int] = field(default_factory=dict)
    actions: Mapping[tuple[str, str], int] = field(default_factory=dict)
    num_flushes: int = 0
    step: int = 0
    flushed_at: float | None = None
    running: bool = True
    readable: bool = True
    seconds: Mapping[str, float] = field(default_factory=dict)
    num_ignored: int = 0


class Source(Protocol):
    """Where an exporter gets its numbers."""

    def read(self) -> Snapshot:
        """The picture of now. Called at every scrape, from any thread, perhaps from several at once."""
        ...


def _sum(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in {**a, **b}}
