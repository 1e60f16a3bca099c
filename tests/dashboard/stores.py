"""Run stores for the tests, written through the real RunStore with statistics that follow from counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.monitor.store import RunStore
from equipoise.types import Action, Alert, Finding, RoutingStats

TOKENS = 4096
TOP_K = 2


def counts(num_experts: int, seed: int, *, hot: int | None = None) -> np.ndarray:
    """Assignments of one window: near fair, or nearly all tokens to the expert `hot`."""
    share = np.random.default_rng(seed).dirichlet(np.full(num_experts, 60.0))
    if hot is not None:
        share = 0.02 * share
        share[hot] += 0.98
    return np.round(share * TOKENS * TOP_K).astype(np.int64)


def record(layer: str, step: int, counts_E: np.ndarray, dropped: dict[str, int] | None = None) -> RoutingStats:
    """The statistics of one layer and window."""
    num_experts = len(counts_E)
    sums = RoutingSums(
        num_tokens=TOKENS,
        counts_E=counts_E,
        probs_sum_E=counts_E / TOP_K,
        token_entropy_sum=0.6 * TOKENS * np.log(num_experts),
        logit_sum=0.0,
        logit_sq_sum=2.25 * TOKENS * num_experts,
        logsumexp_sum=3.0 * TOKENS,
        dropped=dropped or {},
        losses={"switch": float(TOKENS)},
    )
    return routing_stats(layer, step, sums)


def window(layers: list[str], step: int, num_experts: int = 8, *, broken: str | None = None) -> list[RoutingStats]:
    """One flush; the layer `broken` has collapsed onto its expert 5 (or the last)."""
    hot = min(5, num_experts - 1)
    return [
        record(layer, step, counts(num_experts, 1000 * step + i, hot=hot if layer == broken else None))
        for i, layer in enumerate(layers)
    ]


def collapse(layer: str, state: str, step: int, *, since: int, message: str = "") -> Alert:
    """The alert for a collapse onto expert 5."""
    message = message or f"{layer}: expert 5 receives 98% of the tokens, 1.1 of 8 experts are effective"
    finding = Finding("collapse", layer, 5, "critical", 0.98, 0.5, message, "Activate a quantile bias on this layer.")
    return Alert(f"{layer}:collapse", state, since, step, finding)


def write_run(
    path: Path,
    *,
    layers: list[str] | None = None,
    num_experts: int = 8,
    flushes: int = 12,
    every: int = 10,
    name: str = "demo",
    status: str = "finished",
    incident: bool = False,
) -> Path:
    """A run folder. incident: the second layer collapses in the middle, is repaired, and recovers."""
    layers = layers or ["layers.0.mlp", "layers.1.mlp"]
    middle = flushes // 2
    with RunStore(path) as store:
        store.set_meta(name=name, total_steps=flushes * every, status=status)
        for flush in range(1, flushes + 1):
            step = flush * every
            bad = incident and middle <= flush < middle + 2
            with store.transaction():
                store.scalars(
                    step,
                    {
                        "loss": 6.0 / flush**0.3,
                        "grad_norm": 1.0 + flush % 3,
                        "val_perplexity": 90.0 - 10 * flush / flushes,
                    },
                )
                store.routing(window(layers, step, num_experts, broken=layers[-1] if bad else None))
        if incident:
            since, fired, over = (flush * every for flush in (middle, middle + 1, middle + 3))
            store.alert(collapse(layers[-1], "firing", fired, since=since))
            store.action(Action("quantile_bias", layers[-1], fired, f"{layers[-1]}:collapse", {"max_violation": 6.9}))
            store.alert(collapse(layers[-1], "resolved", over, since=since))
    return path
