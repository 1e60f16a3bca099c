"""What is exported: every metric by name, help text and labels, made from a snapshot. One function per level of detail.

Names after prometheus.io/docs/practices/naming: prefix, base units, `_total` on counters, no colons (those belong to
recording rules). A number that is not known is left out, not exported as 0.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from equipoise.monitor.baseline import Baseline
from equipoise.monitor.prometheus.source import LayerTotals, Snapshot
from equipoise.types import Alert, RoutingStats

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

Labels = tuple[str, ...]
Rows = Iterable[tuple[Labels, float]]
_RANK = {"critical": 0, "warning": 1, "info": 2}
_PREFIX = "equipoise_"

# Of the newest flush, per layer: name, help, value. Left out for a flush without tokens, which says nothing.
LAYER_GAUGES: tuple[tuple[str, str, Callable[[RoutingStats], float]], ...] = (
    ("load_entropy_ratio", "Entropy of the load over ln E, 1 is even", lambda s: s.load_entropy),
    ("token_entropy_ratio", "Mean entropy of the tokens' router probabilities over ln E", lambda s: s.token_entropy),
    ("marginal_entropy_ratio", "Entropy of the mean router probabilities over ln E", lambda s: s.marginal_entropy),
    ("mutual_information_nats", "How much a token tells about its expert", lambda s: s.mutual_information),
    ("max_violation_ratio", "MaxVio: load of the busiest expert over fair, minus 1", lambda s: s.max_violation),
    ("min_load_ratio", "Load of the least loaded expert over fair", lambda s: s.min_load),
    ("load_cv_ratio", "Standard deviation over mean of the load, 0 is even", lambda s: s.load_cv),
    ("gini_ratio", "Gini coefficient of the load, 0 is even", lambda s: s.gini),
    ("effective_experts", "How many evenly loaded experts the load is worth", lambda s: s.effective_experts),
    ("dead_experts", "Experts below a tenth of their fair load, given enough tokens", lambda s: len(s.dead_experts)),
    ("max_token_share_ratio", "Share of the tokens that reach the busiest expert", lambda s: s.max_token_share),
    ("logit_mean", "Mean of the router logits", lambda s: s.logit_mean),
    ("logit_std", "Standard deviation of the router logits", lambda s: s.logit_std),
    ("logit_logsumexp", "Mean over tokens of the log-sum-exp of the router logits", lambda s: s.logit_logsumexp),
)


def clean(text: str) -> str:
    r"""A name as a label value: halves of surrogate pairs, which have no UTF-8, and control characters are spelled out.

    Quotes, backslashes and line breaks are legal values; the exposition escapes them.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(f"\\x{ord(char):02x}" if char < " " and char != "\n" else char for char in text)


# -------------------------------------------------------------------------------------------------- about the run


def run_families(snapshot: Snapshot) -> list[Metric]:
    """About the run and its monitor; no label but the run's name, and reasons."""
    run, totals = clean(snapshot.run), list(snapshot.layers.values())
    flushed = [((run,), snapshot.flushed_at)] if snapshot.flushed_at is not None else []
    version = {"version": _version(), "python": platform.python_version()}
    assignments, tokens = sum(int(each.counts_E.sum()) for each in totals), sum(each.num_tokens for each in totals)
    return [
        _info("build", "Version of equipoise that exports.", (), [((), version)]),
        _gauge("run_running", "1 while the run goes on, 0 after its end.", "run", [((run,), snapshot.running)]),
        _gauge("source_up", "1 if the run could be read at this scrape.", "run", [((run,), snapshot.readable)]),
        _gauge("last_flush_timestamp_seconds", "When routing was last flushed, unix time.", "run", flushed),
        _gauge("last_flush_step", "Step of the newest flush.", "run", [((run,), snapshot.step)]),
        _counter("flushes", "Flushes of routing statistics.", "run", [((run,), snapshot.num_flushes)]),
        _gauge("layers", "MoE layers that are watched.", "run", [((run,), len(totals))]),
        _counter("ignored_names", "Layers, rules, ... beyond what is kept.", "run", [((run,), snapshot.num_ignored)]),
        _counter("routed_tokens", "Tokens routed, once in each layer.", "run", [((run,), tokens)]),
        _counter("assignments", "Assignments of tokens to experts, before drops.", "run", [((run,), assignments)]),
        *_by_reason("", snapshot, "run", [((run,), each) for each in totals]),
        *_worst(run, [each.last for each in totals if each.last.num_tokens]),
    ]


def alert_families(snapshot: Snapshot) -> list[Metric]:
    """What the monitor's own rules found: critical alerts first, so that these stay when room is short."""
    run = clean(snapshot.run)
    firing = sorted(snapshot.firing, key=lambda alert: _RANK.get(alert.finding.severity, len(_RANK)))
    return [
        _gauge(
            "alert_firing",
            "1 for each alert of the monitor's own rules that fires; absent when it is over.",
            "run layer rule severity",
            [((run, *_about(alert)), 1) for alert in firing],
        ),
        _gauge(
            "aftermath",
            "1 for each finding that a repair in force has left as it was: part of an incident that is over, no alert.",
            "run layer rule",
            [((run, clean(each.layer), clean(each.rule)), 1) for each in snapshot.aftermath],
        ),
        _counter(
            "alerts_fired",
            "Alerts of the monitor's own rules, each counted when it began to fire.",
            "run rule severity",
            [((run, clean(rule), clean(severity)), count) for (rule, severity), count in snapshot.fired.items()],
        ),
        _counter(
            "actions",
            "Changes of repairs, each counted once: proposed, failed, applied, and later kept or undone.",
            "run kind result",
            [((run, clean(kind), clean(result)), count) for (kind, result), count in snapshot.actions.items()],
        ),
    ]


def cost_families(run: str, seconds: Mapping[str, float]) -> list[Metric]:
    """What watching and exporting have cost."""
    rows = [((clean(run), clean(part)), spent) for part, spent in seconds.items()]
    return [_counter("monitor_seconds", "Time spent on watching and exporting, by part.", "run part", rows)]


def detail_families(run: str, requested: str, effective: str, series: tuple[int, int, int]) -> list[Metric]:
    """What the budget has done. series: exported, left out, the most."""
    name, (exported, dropped, limit) = (clean(run),), series
    return [
        _info(
            "detail",
            "Level of detail that was asked for, and the one that fits the budget of series.",
            ("run",),
            [(name, {"requested": requested, "effective": effective})],
        ),
        _gauge("series", "Series in this exposition.", "run", [(name, exported)]),
        _gauge("series_dropped", "Series left out because they did not fit the budget.", "run", [(name, dropped)]),
        _gauge("series_limit", "Budget of series.", "run", [(name, limit)]),
    ]


# ----------------------------------------------------------------------------------------- per layer, per expert


def layer_families(snapshot: Snapshot, baselines: Mapping[str, Baseline]) -> list[Metric]:
    """Per layer: gauges of the newest flush, and totals."""
    run = clean(snapshot.run)
    totals: dict[Labels, LayerTotals] = {(run, clean(layer)): each for layer, each in snapshot.layers.items()}
    spoken: dict[Labels, RoutingStats] = {labels: each.last for labels, each in totals.items() if each.last.num_tokens}
    normal = [
        ((run, clean(layer)), baselines[layer].logit_std)
        for layer in snapshot.layers
        if layer in baselines and baselines[layer].logit_std > 0
    ]
    losses = [((*labels, clean(name)), value) for labels, last in spoken.items() for name, value in last.losses.items()]
    return [
        _layer_gauge("experts", "Experts of the layer, E.", totals, lambda each: len(each.counts_E)),
        _layer_gauge("window_tokens", "Tokens of the newest flush.", totals, lambda each: each.last.num_tokens),
        _layer_gauge(
            "window_assignments", "Assignments of the newest flush.", totals, lambda each: each.last.num_assignments
        ),
        *(_layer_gauge(name, f"{text}, newest flush.", spoken, value) for name, text, value in LAYER_GAUGES),
        _gauge("layer_balance_loss", "Balancing loss before its coefficient, newest flush.", "run layer loss", losses),
        _gauge("layer_baseline_logit_std", "Standard deviation of the router logits in health.", "run layer", normal),
        _counter(
            "layer_tokens",
            "Tokens routed.",
            "run layer",
            [(labels, each.num_tokens) for labels, each in totals.items()],
        ),
        _counter(
            "layer_assignments",
            "Assignments of tokens to experts, before drops.",
            "run layer",
            [(labels, int(each.counts_E.sum())) for labels, each in totals.items()],
        ),
        *_by_reason("layer_", snapshot, "run layer", list(totals.items())),
    ]


def expert_families(snapshot: Snapshot) -> list[Metric]:
    """Per expert: one counter, from which Prometheus makes loads over any time."""
    run = clean(snapshot.run)
    rows = (
        ((run, name, _index(expert)), count)
        for name, each in ((clean(layer), each) for layer, each in snapshot.layers.items())
        for expert, count in enumerate(each.counts_E.tolist())
    )
    help_text = "Assignments of tokens to the expert, before drops."
    return [_counter("expert_assignments", help_text, "run layer expert", rows)]


def num_expert_series(snapshot: Snapshot) -> int:
    """How many samples `expert_families` would make, without making them."""
    return sum(len(each.counts_E) for each in snapshot.layers.values())


# ------------------------------------------------------------------------------------------------------- the pieces


def _by_reason(
    prefix: str, snapshot: Snapshot, labels: str, rows: Sequence[tuple[Labels, LayerTotals]]
) -> list[Metric]:
    """Drops and reroutes, added up over rows with the same labels."""
    dropped: dict[Labels, int] = {}
    rerouted: dict[Labels, int] = {}
    lost: dict[Labels, int] = {}
    for row, each in rows:
        for reason, count in each.dropped.items():
            into, key = (lost, row) if reason == "tokens" else (dropped, (*row, clean(reason)))
            into[key] = into.get(key, 0) + count
        for reason, count in each.rerouted.items():
            key = (*row, clean(reason))
            rerouted[key] = rerouted.get(key, 0) + count
    return [
        _counter(f"{prefix}dropped_assignments", "Assignments lost.", f"{labels} reason", dropped.items()),
        _counter(f"{prefix}dropped_tokens", "Tokens that lost all their assignments.", labels, lost.items()),
        _counter(
            f"{prefix}rerouted_assignments",
            "Assignments that found no room but another place.",
            f"{labels} reason",
            rerouted.items(),
        ),
    ]


def _worst(run: str, window: Sequence[RoutingStats]) -> list[Metric]:
    """One number over all layers, for dashboards of many runs; none without tokens."""
    table: tuple[tuple[str, str, Callable[[RoutingStats], float], Callable[[Iterable[float]], float]], ...] = (
        ("worst_load_entropy_ratio", "Smallest load entropy over ln E of all layers", lambda s: s.load_entropy, min),
        (
            "worst_effective_experts_ratio",
            "Smallest share of experts that the load of a layer is worth",
            lambda s: s.effective_experts / s.num_experts,
            min,
        ),
        ("worst_max_violation_ratio", "Largest MaxVio of all layers", lambda s: s.max_violation, max),
        (
            "worst_max_token_share_ratio",
            "Largest share of tokens that one expert gets",
            lambda s: s.max_token_share,
            max,
        ),
        ("worst_logit_logsumexp", "Largest mean log-sum-exp of router logits", lambda s: s.logit_logsumexp, max),
        ("dead_experts", "Dead experts of all layers", lambda s: len(s.dead_experts), sum),
    )
    families = []
    for name, text, value, over in table:
        known = [found for stats in window if not math.isnan(found := float(value(stats)))]
        families.append(_gauge(name, f"{text}, newest flush.", "run", [((run,), over(known))] if known else []))
    return families


def _about(alert: Alert) -> Labels:
    return clean(alert.finding.layer), clean(alert.finding.rule), clean(alert.finding.severity)


def _layer_gauge(name: str, text: str, rows: Mapping[Labels, Any], value: Callable[[Any], float]) -> Metric:
    return _gauge(f"layer_{name}", text, "run layer", [(labels, value(each)) for labels, each in rows.items()])


def _gauge(name: str, text: str, labels: str, rows: Rows) -> Metric:
    family: GaugeMetricFamily = core().GaugeMetricFamily(_PREFIX + name, text, labels=labels.split())
    for values, number in rows:
        if not math.isnan(number):
            family.add_metric(values, float(number))
    return family


def _counter(name: str, text: str, labels: str, rows: Rows) -> Metric:
    family: CounterMetricFamily = core().CounterMetricFamily(_PREFIX + name, text, labels=labels.split())
    for values, number in rows:
        family.add_metric(values, number)
    return family


def _info(name: str, text: str, labels: Labels, rows: Iterable[tuple[Labels, dict[str, str]]]) -> Metric:
    family: InfoMetricFamily = core().InfoMetricFamily(_PREFIX + name, text, labels=labels)
    for values, facts in rows:
        family.add_metric(values, facts)
    return family


@cache
def _index(expert: int) -> str:
    return str(expert)


@cache
def _version() -> str:
    try:
        return metadata.version("equipoise")
    except metadata.PackageNotFoundError:
        return "unknown"


def core() -> Any:
    """prometheus_client's metric families. Raises ImportError that names the extra when it is not installed."""
    try:
        return import_module("prometheus_client.core")
    except ImportError as error:
        raise ImportError(
            "exporting metrics needs the package 'prometheus_client', which is not installed. "
            "Install it with: pip install 'equipoise[prometheus]'"
        ) from error
