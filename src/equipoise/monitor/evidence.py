"""What is known about a run, read once from its store: plain records that triage and the post-mortem work on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from equipoise.monitor.incidents import Incident, incidents, repairs
from equipoise.monitor.store import RunStore
from equipoise.types import Action, Alert, RoutingStats

SCALARS = ("loss", "grad_norm", "learning_rate", "tokens_per_s", "val_perplexity")


@dataclass(frozen=True, eq=False)
class Evidence:
    """One run at one moment.

    name, status: as the run says. age_s: seconds since its newest number. routing: every flush of each layer, by step.
    scalars: (step, value) by name. alerts, actions: every change of an alert and of a repair, oldest first.
    times: seconds since 1970 by step, where known.
    """

    name: str
    status: str
    age_s: float
    routing: Mapping[str, tuple[RoutingStats, ...]]
    scalars: Mapping[str, tuple[tuple[int, float], ...]]
    alerts: tuple[Alert, ...]
    actions: tuple[Action, ...]
    times: Mapping[int, float]

    @property
    def last_step(self) -> int:
        """The newest step of anything."""
        steps = [history[-1].step for history in self.routing.values() if history]
        return max(steps + [points[-1][0] for points in self.scalars.values() if points], default=0)

    @property
    def incidents(self) -> list[Incident]:
        """The alerts with their repairs, the newest first."""
        return incidents(self.alerts, self.actions)

    @property
    def repairs(self) -> list[Action]:
        """One record per repair, oldest first."""
        return repairs(self.actions)


def evidence_of(store: RunStore, now: float | None = None) -> Evidence:
    """Read everything of one moment. now: seconds since 1970; None asks the clock."""
    with store.snapshot():
        meta = store.meta()
        history = {name: store.scalar_history(name) for name in SCALARS}
        times = {step: when for points in history.values() for step, _, when in points}
        return Evidence(
            name=str(meta.get("name", store.path.parent.name)),
            status=str(meta.get("status", "unknown")),
            age_s=(time.time() if now is None else now) - max(times.values(), default=float("-inf")),
            routing={layer: tuple(store.routing_history(layer)) for layer in store.layers()},
            scalars={name: tuple((step, value) for step, value, _ in points) for name, points in history.items()},
            alerts=tuple(store.alerts()),
            actions=tuple(store.actions()),
            times=times,
        )
