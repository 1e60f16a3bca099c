"""Run stores for the tests, written through the real RunStore with statistics that follow from counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from equipoise.monitor.specialisation import (
    Information,
    LayerRoles,
    Roles,
    Saturation,
    Served,
    Split,
    Vocabulary,
)
from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.monitor.store import RunStore
from equipoise.types import Action, Alert, CoSelection, Finding, RoutingStats

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
            key, detail = f"{layers[-1]}:collapse", {"max_violation": 6.9}
            store.action(Action("quantile_bias", layers[-1], fired, key, detail, note=layers[-1]))  # a hostile one, too
            store.alert(collapse(layers[-1], "resolved", over, since=since))
    return path


def together(layer: str, step: int, num_experts: int = 8, k: int = 2) -> CoSelection:
    """400 tokens: half choose experts 1 and 2, the others any k in a row. k = 1: none are chosen together."""
    counts_EE = np.zeros((num_experts, num_experts), dtype=np.int64)
    for token in range(400):
        chosen = [(token + i) % num_experts for i in range(k)] if token % 2 or k == 1 else [1, 2]
        counts_EE[np.ix_(chosen, chosen)] += 1
    return CoSelection(layer, step, 400, counts_EE)


def page_for(layer: str, state: str, step: int, *, since: int) -> Alert:
    """The alert that calls a human: no repair is left."""
    message = f"{layer}: no repair is left for collapse; tried: quantile_bias undone"
    finding = Finding("recovery_exhausted", layer, None, "critical", 1.0, 0.0, message, "Look at the incident.")
    return Alert(f"{layer}:recovery_exhausted", state, since, step, finding)


def write_ladder(path: Path) -> Path:
    """A run of 40 flushes, 10 steps apart, with three incidents of layers.1.mlp.

    The first, from step 60: quantile_bias makes held-out text worse and is undone at once, spill is kept. The second,
    from step 180: reseed can't be done, router_rollback is undone, a human is called, resolved by itself. Meanwhile in
    layers.0.mlp the input is to blame. The third, from step 330, lasts: boost is on trial.
    """
    layers, broken = ["layers.0.mlp", "layers.1.mlp"], "layers.1.mlp"
    key, other = f"{broken}:collapse", f"{layers[0]}:collapse"
    bad = {*range(60, 90, 10), *range(180, 250, 10), *range(330, 410, 10)}
    begun = {"loss_before": 2.30, "max_violation_before": 6.86}  # perplexity exp(2.3) = 9.974
    first, second = begun | {"loss_after": 2.60}, begun | {"loss_after": 2.31}  # exp(2.6) = 13.46, exp(2.31) = 10.07
    end = second | {"loss_after": 2.29, "max_violation_after": 0.21, "steps": 20.0}  # exp(2.29) = 9.875
    worse = "held-out loss rose from 2.300 to 2.600, more than 0.05"
    back = {"max_violation_after": 6.9, "steps": 40.0}
    look = "held-out text does not show it, the model is as it was: look at what is sent"
    actions = [
        Action("quantile_bias", broken, 70, key, first, "applied", "a bias of at most 3.1"),
        Action("quantile_bias", broken, 70, key, first | {"steps": 0.0}, "undone", worse),
        Action("spill", broken, 70, key, second, "applied", "what does not fit goes to the dense path"),
        Action("spill", broken, 90, key, end, "kept", "the alert is resolved"),
        Action("reseed", broken, 190, key, begun, "failed", "reseed: needs dead experts, found none"),
        Action("router_rollback", broken, 190, key, second, "applied", "router of step 150"),
        Action("look_at_input", layers[0], 210, other, {}, "proposed", look),
        Action("router_rollback", broken, 230, key, second | back, "undone", "the alert fires still, 4 flushes later"),
        Action("page", broken, 230, key, {}, "applied", "tried: reseed failed, router_rollback undone"),
        Action("boost", broken, 340, key, begun | {"loss_after": 2.305}, "applied", "balancing counts 10 times"),
    ]
    alerts = [
        collapse(broken, "firing", 70, since=60),
        collapse(broken, "resolved", 90, since=60),
        collapse(broken, "firing", 190, since=180),
        collapse(layers[0], "firing", 210, since=200, message="layers.0.mlp: expert 5 receives 61% of the tokens"),
        page_for(broken, "firing", 230, since=190),
        collapse(broken, "resolved", 260, since=180),
        page_for(broken, "resolved", 260, since=190),
        collapse(layers[0], "resolved", 260, since=200),
        collapse(broken, "firing", 340, since=330),
    ]
    with RunStore(path) as store, store.transaction():
        store.set_meta(name="a ladder", total_steps=800, status="running")
        for step in range(10, 410, 10):
            store.scalars(step, {"loss": 6.0 / step**0.2, "val_perplexity": 60.0 - step / 20})
            store.routing(window(layers, step, broken=broken if step in bad else None))
        for alert in alerts:
            store.alert(alert)
        for action in actions:
            store.action(action)
    return path


def make_roles(words=("the", " self"), num_experts=4, layers=("layers.0.mlp", "layers.1.mlp")) -> Roles:
    """What two layers serve: 60 tokens of two domains, counts that differ by expert; expert 0 has no words."""
    told = Information(0.1, 0.001, 0.01, 0.02, 0.002, 0.69)
    counts = tuple(tuple(10 + (7 * e + 3 * g) % 11 for e in range(num_experts)) for g in range(2))
    load = tuple(map(sum, zip(*counts, strict=True)))
    served = tuple(Served(i, word, 12 - i, 20, 2.5) for i, word in enumerate(words))
    found = tuple(
        LayerRoles(
            layer=name,
            num_tokens=60,
            load=load,
            splits={"domain": Split(("python", "verse"), (30, 30), counts, told)},
            vocabulary=Vocabulary(7, 0.8, 0.3, told),
            tokens=((),) + (served,) * (num_experts - 1),
        )
        for name in layers
    )
    curves = [dict.fromkeys(layers, pair) for pair in ((0.6, 1.0), (0.5, 0.5))]
    return Roles(20, "a text", 60, 4, 30, found, Saturation((10, 20), *curves))
