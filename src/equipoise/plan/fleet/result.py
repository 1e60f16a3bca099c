"""What a simulation came to: counts that add up, quantiles, queues and the load of each link."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from equipoise.plan.fleet.cell import Cell
from equipoise.plan.fleet.scenario import Scenario
from equipoise.plan.fleet.step import Done

Array = np.ndarray
WARM_UP = 0.1  # share of the time whose arrivals are not in the latencies: it begins with empty queues
SAMPLES = 20_000  # of the queue's depth


@dataclass(frozen=True)
class Latency:
    """Seconds of the queries that were served, from arrival to the end of their step; NaN where there were none."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, eq=False)
class FleetResult:
    """One design under the scenario's traffic.

    seconds: simulated. arrived = served + in_flight + rejected, in queries; in_flight wait or are in a step at the end.
    latency, wait_s: of the queries that were served and came after the first tenth of the time; wait_s is the mean
    until their step began. queue_mean, queue_p99, queue_max: queries waiting in the whole fleet.
    steps, tokens_per_step: of all groups. assignments = those an expert computed (moved: not the one they wanted) +
    spilled (to the shared expert) + dropped. copies_per_token: rows sent to other ranks, per token and layer, one way.
    link_bytes_R: sent by each rank in all, and as many got; link_load_R: of what its link could carry one way.
    busy_R: share of the time that each rank computes. link_share: of the steps' time that is exchanges.
    straggler: the busiest rank's computing over the mean rank's, by steps.
    latencies: float64, each query's; depth_at, depth: the queue over time.
    """

    design: str
    seconds: float
    arrived: int
    served: int
    in_flight: int
    rejected: int
    latency: Latency
    wait_s: float
    queue_mean: float
    queue_p99: float
    queue_max: float
    steps: int
    tokens_per_step: float
    assignments: int
    moved: int
    spilled: int
    dropped: int
    copies_per_token: float
    link_bytes_R: tuple[float, ...]
    link_load_R: tuple[float, ...]
    busy_R: tuple[float, ...]
    link_share: float
    straggler: float
    latencies: Array
    depth_at: Array
    depth: Array

    @property
    def throughput(self) -> float:
        """Queries served per second."""
        return self.served / self.seconds if self.seconds else 0.0

    def fields(self) -> dict[str, Any]:
        """For JSON: without the series; what is not a number is None."""
        values = asdict(self)
        for name in ("latencies", "depth_at", "depth"):
            del values[name]
        values["throughput"] = self.throughput
        values["latency"] = {name: _number(value) for name, value in values["latency"].items()}
        return {name: _number(value) for name, value in values.items()}


class Tally:
    """Sums over the steps of a simulation."""

    def __init__(self, ranks: int) -> None:
        self.sent_R, self.busy_R = np.zeros(ranks), np.zeros(ranks)
        self.steps = self.tokens = self.copies = self.assignments = self.moved = self.no_room = 0
        self.step_s = self.link_s = self.busiest_s = self.mean_busy_s = 0.0

    def add(self, ranks: slice, done: Done) -> None:
        """One step of these ranks."""
        step = done.step
        self.sent_R[ranks] += step.sent_R
        self.busy_R[ranks] += step.busy_R
        self.steps += 1
        self.tokens += done.tokens
        self.copies += step.copies
        self.assignments += done.assignments
        self.moved += done.moved
        self.no_room += done.no_room
        self.step_s += step.seconds
        self.link_s += step.link_s
        self.busiest_s += step.expert_s
        self.mean_busy_s += float(step.busy_R.mean())


def summarise(scenario: Scenario, cells: Sequence[Cell], tally: Tally, end: float) -> FleetResult:
    """The result at simulated time `end`, up to which the cells have looked."""
    model = scenario.model
    times, starts, dones, rejected = (
        np.concatenate([getattr(cell, name) for cell in cells]) for name in ("times", "start_N", "done_N", "rejected_N")
    )
    arrived, served = times <= end, dones <= end
    measured = served & (times >= WARM_UP * end)
    latencies = np.sort(dones[measured] - times[measured])
    depth_at = np.linspace(0, end, SAMPLES)
    depth = _depth(times[arrived & ~rejected], starts, depth_at)
    lost = {"spilled": 0, "dropped": 0} | {"spilled" if model.overflow == "shared" else "dropped": tally.no_room}
    seconds = max(end, 1e-12)
    return FleetResult(
        design=scenario.design.name,
        seconds=end,
        arrived=int(arrived.sum()),
        served=int(served.sum()),
        rejected=int(rejected.sum()),
        in_flight=int((arrived & ~rejected & ~served).sum()),
        latency=_latency(latencies),
        wait_s=float(np.mean(starts[measured] - times[measured])) if measured.any() else float("nan"),
        queue_mean=float(depth.mean()),
        queue_p99=float(np.quantile(depth, 0.99)),
        queue_max=float(depth.max()),
        steps=tally.steps,
        tokens_per_step=tally.tokens / max(tally.steps, 1),
        assignments=tally.assignments,
        moved=tally.moved,
        copies_per_token=tally.copies / max(tally.tokens * model.num_layers, 1),
        link_bytes_R=tuple(tally.sent_R.tolist()),
        link_load_R=tuple((tally.sent_R / (seconds * scenario.machines.link.rate)).tolist()),
        busy_R=tuple((tally.busy_R / seconds).tolist()),
        link_share=tally.link_s / max(tally.step_s, 1e-12),
        straggler=tally.busiest_s / max(tally.mean_busy_s, 1e-12),
        latencies=latencies,
        depth_at=depth_at,
        depth=depth,
        **lost,
    )


def _latency(latencies: Array) -> Latency:
    if not len(latencies):
        return Latency(*[float("nan")] * 5)
    p50, p90, p99 = np.quantile(latencies, (0.5, 0.9, 0.99))
    return Latency(float(latencies.mean()), float(p50), float(p90), float(p99), float(latencies[-1]))


def _depth(arrivals: Array, starts: Array, at: Array) -> Array:
    """Queries that have arrived and not begun, at each of the times."""
    begun = np.sort(starts[np.isfinite(starts)])
    return np.searchsorted(np.sort(arrivals), at, side="right") - np.searchsorted(begun, at, side="right")


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value
