"""What is known about a run, read once from its store: plain records that triage and the post-mortem work on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from equipoise.monitor.incidents import Incident, incidents, repairs
from equipoise.monitor.store import RunStore
from equipoise.types import Action, Alert, RoutingStats

SCALARS = ("loss", "grad_norm", "learning_rate", "tokens_per_s", "val_perplexity")
IN_SERVICE = (
    "tokens_per_s", "prompt_tokens_per_s", "requests_per_s", "queue_depth", "running", "cache_used_share",
    "time_to_first_token_ms.p99", "inter_token_ms.p99",
)  # fmt: skip
FEWEST, MOST_FLUSHES = 16, 2000
_STATS_BYTES, _COUNT_BYTES, _SCALAR_BYTES, _EVENT_BYTES = 900, 7, 40, 700  # of a record as JSON
EXPERTS_P99 = "experts_ms.{}.p99"  # of a layer


@dataclass(frozen=True)
class Serving:
    """A server that runs, at one moment, in its own words.

    folder: of its records. admin_port: on its machine, None where it has none. weights: the checkpoint in service;
    version: counts its changes. acts: whether repairs are made, or only proposed. down: why it takes no requests, ""
    if it does. degraded: why answers may be worse than usual. faults: that were put in on purpose. num_open: requests.
    max_waiting: requests that the queue holds.
    """

    folder: str
    admin_port: int | None
    weights: str
    version: int
    acts: bool
    down: str
    degraded: tuple[str, ...]
    faults: tuple[str, ...]
    num_open: int
    max_waiting: int


@dataclass(frozen=True, eq=False)
class Evidence:
    """One run at one moment.

    name, status: as the run says. age_s: seconds since its newest number. routing: every flush of each layer, by step.
    scalars: (step, value) by name. alerts, actions: every change of an alert and of a repair, oldest first.
    times: seconds since 1970 by step, where known. kind: "server", or "" for training. serving: the server's own word;
    None for records alone.
    """

    name: str
    status: str
    age_s: float
    routing: Mapping[str, tuple[RoutingStats, ...]]
    scalars: Mapping[str, tuple[tuple[int, float], ...]]
    alerts: tuple[Alert, ...]
    actions: tuple[Action, ...]
    times: Mapping[int, float]
    kind: str = ""
    serving: Serving | None = None

    @property
    def is_server(self) -> bool:
        """Whether these are a server's records."""
        return self.kind == "server"

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


def evidence_of(store: RunStore, now: float | None = None, *, most_bytes: int | None = None) -> Evidence:
    """Read everything of one moment, or about as much as most_bytes hold: all that is new, and of what is old less.

    now: seconds since 1970; None asks the clock.
    """
    with store.snapshot():
        meta, layers = store.meta(), store.layers()
        kind = str(meta.get("kind", ""))
        names = (*IN_SERVICE, *(EXPERTS_P99.format(layer) for layer in layers)) if kind == "server" else SCALARS
        last = None if most_bytes is None else max(FEWEST, most_bytes // (4 * _SCALAR_BYTES * len(names)))
        history = {name: store.scalar_history(name, last=last) for name in names}
        times = {step: when for points in history.values() for step, _, when in points}
        steps = None if most_bytes is None else _thinned(store, layers, most_bytes // 2)
        events = None if most_bytes is None else max(FEWEST, most_bytes // (8 * _EVENT_BYTES))
        return Evidence(
            name=str(meta.get("name", store.path.parent.name)),
            status=str(meta.get("status", "unknown")),
            age_s=(time.time() if now is None else now) - max(times.values(), default=float("-inf")),
            routing={layer: tuple(store.routing_history(layer, steps)) for layer in layers},
            scalars={name: tuple((step, value) for step, value, _ in points) for name, points in history.items()},
            alerts=tuple(store.alerts(events)),
            actions=tuple(store.actions(events)),
            times=times,
            kind=kind,
        )


def _thinned(store: RunStore, layers: Sequence[str], most_bytes: int) -> list[int]:
    """Steps of flushes: half of what fits are the newest, the other half is spread over those from before."""
    steps = store.flush_steps()
    row = _STATS_BYTES + _COUNT_BYTES * max((stats.num_experts for stats in store.latest_routing()), default=0)
    half = max(FEWEST, min(MOST_FLUSHES, most_bytes // (row * max(1, len(layers)))) // 2)
    old, new = steps[:-half], steps[-half:]
    return old[:: max(1, -(-len(old) // half))] + new
