"""What the pages show, as frozen records: plain numbers, read from a run store at one moment.

They hold no connection and draw no page. Steps are optimizer steps, times are seconds since 1970.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equipoise.monitor.incidents import Incident
from equipoise.types import RoutingStats


@dataclass(frozen=True, eq=False)
class Head:
    """A run at a glance. None for what it has not recorded.

    spark: the loss, at most 60 points, with None where it was not finite. worst: the newest record of the layer with
    the fewest effective experts relative to E. flush_time: of the newest flush, else of the file's last change.
    num_repairs: how many repairs were applied, whether they were kept or undone later. is_server: it serves a model,
    and its steps are the engine's; first_token_ms (p99) and queue_depth are then of the last minute.
    """

    name: str
    status: str
    step: int
    total_steps: int | None
    loss: float | None
    val_perplexity: float | None
    tokens_per_s: float | None
    spark: tuple[float | None, ...]
    worst: RoutingStats | None
    num_layers: int
    firing: tuple[Incident, ...]
    num_repairs: int
    flush_time: float
    is_server: bool = False
    first_token_ms: float | None = None
    queue_depth: float | None = None


@dataclass(frozen=True)
class Series:
    """One curve: (step, value) by step, None where the value was not finite. At most a few hundred points."""

    name: str
    points: tuple[tuple[int, float | None], ...]


@dataclass(frozen=True)
class ExpertTimes:
    """What each expert of a layer takes per step, newest, in milliseconds. None where it was never timed."""

    p50: tuple[float | None, ...]
    p99: tuple[float | None, ...]

    @property
    def slowest(self) -> int | None:
        """The expert with the largest p99; None where none was timed."""
        timed = {expert: value for expert, value in enumerate(self.p99) if value is not None}
        return max(timed, key=timed.__getitem__) if timed else None


@dataclass(frozen=True, eq=False)
class Frame:
    """Every layer at one flush, in the order of the model."""

    step: int
    layers: tuple[RoutingStats, ...]

    @property
    def num_experts(self) -> int:
        """The most experts that a layer has."""
        return max((stats.num_experts for stats in self.layers), default=0)

    def find(self, layer: str) -> RoutingStats | None:
        """The record of one layer."""
        return next((stats for stats in self.layers if stats.layer == layer), None)


@dataclass(frozen=True, eq=False)
class Evenness:
    """Effective experts relative to E, in (0, 1], of every layer over time. share_LS: NaN where there is no record."""

    steps: tuple[int, ...]
    layers: tuple[str, ...]
    share_LS: np.ndarray


@dataclass(frozen=True, eq=False)
class Together:
    """How often two experts are chosen together, relative to chance. experts: the busiest, in their order.

    lift_EE: float64; NaN on the diagonal and where there are too few tokens to tell.
    """

    experts: tuple[int, ...]
    lift_EE: np.ndarray


def evenness_of(stats: RoutingStats) -> float:
    """Effective experts relative to E, in (0, 1]: 1 is even, 1/E is one expert for all."""
    return stats.effective_experts / max(stats.num_experts, 1)
