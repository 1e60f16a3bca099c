"""More rules, each a small frozen class from a window to findings, for drops, logits, drift, and the absolute profile.

`CollapseDetector` (detectors.py) is the rule that pages; these add what else goes wrong. A rule that needs to know what
is normal takes baselines. Writing one: a frozen dataclass of thresholds with a `__call__`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from equipoise.monitor.baseline import Baseline
from equipoise.monitor.chance import FALSE_ALARMS, check_rate, needed_nats, share_nats
from equipoise.monitor.stats_drift import drift_floor, population_stability_index
from equipoise.types import Finding, RoutingStats, Severity

Levels = tuple[tuple[float, Severity], ...]
DROP_LEVELS: Levels = ((0.05, "critical"), (0.01, "warning"), (0.001, "info"))


@dataclass(frozen=True)
class DropRule:
    """Assignments are dropped: more than the levels, surely.

    levels: (share, severity), the highest first. false_alarms: the probability per window that chance alone brings a
    layer above a level that it is at, for all layers and levels together, where assignments are lost one by one; a
    bound, see chance.py. None takes levels literally. A capacity loses them in clumps, by batch and expert, which no
    such rate covers: layers a little below a level may be above it by chance. min_dropped: drops to be seen at all.
    Raises ValueError for a rate that is no probability.
    """

    levels: Levels = DROP_LEVELS
    false_alarms: float | None = FALSE_ALARMS
    min_dropped: int = 20

    def __post_init__(self) -> None:
        if self.false_alarms is not None:
            check_rate("false_alarms", self.false_alarms)

    def __call__(self, window: Sequence[RoutingStats]) -> list[Finding]:
        """One finding per layer, of the highest level that is passed."""
        nats = 0.0 if self.false_alarms is None else needed_nats(len(window) * len(self.levels), self.false_alarms)
        return [finding for stats in window if (finding := self._judge(stats, nats)) is not None]

    def _judge(self, stats: RoutingStats, nats: float) -> Finding | None:
        rate, total = stats.drop_rate, max(stats.num_assignments, 1)
        for limit, severity in self.levels:
            if rate > limit and rate * total >= self.min_dropped and share_nats(rate, limit, total) >= nats:
                return Finding(
                    rule="drops",
                    layer=stats.layer,
                    expert=None,
                    severity=severity,
                    value=rate,
                    threshold=limit,
                    message=f"{stats.layer} drops {rate:.2%} of its assignments, more than {limit:.1%}",
                    remedy=(
                        'Set overflow="next_choice" or "shared", raise the capacity factor, or balance the router; '
                        "equipoise.layer.drop_rate says what a fair router would drop."
                    ),
                )
        return None


@dataclass(frozen=True)
class LogitRule:
    """Router logits blow up, or are not finite.

    max_logsumexp: of the mean log-sum-exp; the logits of healthy routers stay in the tens. std_ratio: how many times
    the baseline's standard deviation is too much, and its inverse too little; needs baselines. So does the finding
    "not_finite": logits that are NaN are either not known, as of some other libraries' routers, or broken.
    """

    max_logsumexp: float = 100.0
    std_ratio: float = 3.0
    baselines: Mapping[str, Baseline] = field(default_factory=dict)

    def __call__(self, window: Sequence[RoutingStats]) -> list[Finding]:
        """At most one finding per layer; layers whose logits are not known (NaN) pass."""
        return [finding for stats in window if stats.num_tokens and (finding := self._judge(stats)) is not None]

    def _judge(self, stats: RoutingStats) -> Finding | None:
        remedy = "Add a z-loss (ZLoss(1e-3)), lower the router's learning rate, or go back to the last good checkpoint."
        lse, baseline = stats.logit_logsumexp, self.baselines.get(stats.layer)
        if math.isinf(lse) or lse > self.max_logsumexp:
            message = f"{stats.layer}: the router's logits have a mean log-sum-exp of {lse:.4g}"
            return Finding("logits", stats.layer, None, "critical", lse, self.max_logsumexp, message, remedy)
        if math.isnan(lse) and baseline is not None and math.isfinite(baseline.logit_logsumexp):
            message = f"{stats.layer}: the router's logits are not numbers: it, or something before it, is broken"
            remedy = "Find the first weight that is not finite, and go back to a checkpoint or copy another expert."
            return Finding("not_finite", stats.layer, None, "critical", lse, self.max_logsumexp, message, remedy)
        ratio = stats.logit_std / baseline.logit_std if baseline and baseline.logit_std > 0 else 1.0
        if not 1 / self.std_ratio <= ratio <= self.std_ratio and not math.isnan(ratio):
            assert baseline is not None
            message = (
                f"{stats.layer}: the standard deviation of the router's logits is {stats.logit_std:.3g}, "
                f"{ratio:.2g} times the baseline's {baseline.logit_std:.3g}"
            )
            return Finding("logits", stats.layer, None, "warning", ratio, self.std_ratio, message, remedy)
        return None


@dataclass(frozen=True)
class LoadDriftRule:
    """The load has moved away from the baseline, by more than the noise of both samples.

    Measured by PSI (`population_stability_index`), the usual index of drift; 0.25 is usually called a large one.
    false_alarms: the probability per window that two samples of one load, in any layer, show more than what is added to
    the limit for it: see `drift_floor`, whose tail is right within a factor of 1.5 where it was simulated.
    Raises ValueError for a rate that is no probability.
    """

    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    limit: float = 0.25
    false_alarms: float = FALSE_ALARMS

    def __post_init__(self) -> None:
        check_rate("false_alarms", self.false_alarms)

    def __call__(self, window: Sequence[RoutingStats]) -> list[Finding]:
        """At most one finding per layer that has a baseline."""
        known = [(stats, baseline) for stats in window if (baseline := self._of(stats)) is not None]
        quantile = 1.0 - self.false_alarms / max(len(known), 1)
        return [finding for each in known if (finding := self._judge(*each, quantile)) is not None]

    def _of(self, stats: RoutingStats) -> Baseline | None:
        baseline = self.baselines.get(stats.layer)
        return baseline if baseline is not None and len(baseline.counts_E) == stats.num_experts else None

    def _judge(self, stats: RoutingStats, baseline: Baseline, quantile: float) -> Finding | None:
        moved, floor = load_moved(stats.counts_E, np.array(baseline.counts_E), quantile)
        if not moved > self.limit + floor:
            return None
        return Finding(
            rule="load_drift",
            layer=stats.layer,
            expert=None,
            severity="warning",
            value=moved,
            threshold=self.limit + floor,
            message=f"{stats.layer}: the load has moved away from its baseline, PSI {moved:.2f}",
            remedy="Compare the text with the baseline's: another mix of domains moves the load, and so does damage.",
        )


def load_moved(counts_E: np.ndarray, baseline_E: np.ndarray, quantile: float = 1 - 1e-9) -> tuple[float, float]:
    """(PSI of the two loads, what chance alone stays below with that probability; infinite without assignments)."""
    floor = drift_floor(len(counts_E), float(counts_E.sum()), float(baseline_E.sum()), quantile)
    return float(population_stability_index(counts_E.astype(np.float64), baseline_E.astype(np.float64))), floor


WHOLE_MODEL = "model"  # the layer of a finding that is about no single one


@dataclass(frozen=True)
class CountRule:
    """The monitor itself is broken: its counters stand still, were reset, or count twice.

    tokens_per_flush: what every layer counts between two flushes where each batch has the same number of real tokens.
    per_flush: `Watch` shows it the flush itself, not a window that reaches back to where there were tokens.
    """

    per_flush: ClassVar[bool] = True
    tokens_per_flush: int

    def __post_init__(self) -> None:
        if self.tokens_per_flush < 1:
            raise ValueError(f"CountRule.tokens_per_flush: expected at least 1, got {self.tokens_per_flush}")

    def __call__(self, window: Sequence[RoutingStats]) -> list[Finding]:
        """One finding for the model, with the first layer that is off."""
        for stats in window:
            if stats.num_tokens != self.tokens_per_flush:
                text = (
                    f"{stats.layer} counted {stats.num_tokens:,} tokens, expected {self.tokens_per_flush:,} per flush"
                )
                remedy = "Trust no other alert now: attach the monitor again, and see who else resets or feeds it."
                return [
                    Finding(
                        rule="counters",
                        layer=WHOLE_MODEL,
                        expert=None,
                        severity="critical",
                        value=float(stats.num_tokens),
                        threshold=float(self.tokens_per_flush),
                        message=f"the monitor's counters are wrong: {text}",
                        remedy=remedy,
                    )
                ]
        return []


@dataclass(frozen=True)
class AbsoluteRule:
    """The thresholds of a widely read checklist, taken literally: fixed numbers, no sample gate, no fair share.

    Kept for whoever has to follow it, and to show what it does: below 5 % utilisation lies every healthy expert once E
    passes 20, and a share of assignments above 50 % is impossible for k >= 2. logit_std_ratio needs baselines.
    """

    low_utilisation: float = 0.05
    high_utilisation: float = 0.80
    one_bin: float = 0.50
    entropy_target: float = 0.80
    entropy_alert: float = 0.50
    cold_load: float = 0.10
    hot_load: float = 1.25
    logit_std_ratio: float = 5.0
    baselines: Mapping[str, Baseline] = field(default_factory=dict)

    def __call__(self, window: Sequence[RoutingStats]) -> list[Finding]:
        """All findings of all layers."""
        return [finding for stats in window if stats.num_tokens for finding in self._judge(stats)]

    def _judge(self, stats: RoutingStats) -> list[Finding]:
        share_E, load_E = stats.load_E / stats.num_experts, stats.load_E
        baseline = self.baselines.get(stats.layer)
        std_ratio = stats.logit_std / baseline.logit_std if baseline and baseline.logit_std > 0 else 0.0
        entropy, token_share = stats.load_entropy, stats.max_token_share
        lowest, highest, least, most = share_E.min(), share_E.max(), load_E.min(), load_E.max()
        table: list[tuple[str, Severity, bool, float, float]] = [
            ("utilisation_low", "warning", lowest < self.low_utilisation, lowest, self.low_utilisation),
            ("utilisation_high", "critical", token_share > self.high_utilisation, token_share, self.high_utilisation),
            ("one_bin", "critical", highest > self.one_bin, highest, self.one_bin),
            ("entropy", "critical", entropy < self.entropy_alert, entropy, self.entropy_alert),
            ("entropy_target", "warning", entropy < self.entropy_target, entropy, self.entropy_target),
            ("cold_expert", "warning", least < self.cold_load, least, self.cold_load),
            ("hot_expert", "warning", most > self.hot_load, most, self.hot_load),
            ("logit_std", "critical", std_ratio > self.logit_std_ratio, std_ratio, self.logit_std_ratio),
        ]
        return [
            Finding(
                rule=rule,
                layer=stats.layer,
                expert=None,
                severity=severity,
                value=float(value),
                threshold=limit,
                message=f"{stats.layer}: {rule.replace('_', ' ')} is {value:.3g}, the limit is {limit:.3g}",
                remedy='Look at it under profile="relative" before acting: a fixed limit knows no fair share.',
            )
            for rule, severity, passed, value, limit in table
            if passed
        ]
