"""Detectors: pure functions of one flushed window, from statistics to findings.

They remember nothing: that a finding lasts is the business of alerts.py. A new detector is a frozen dataclass of
thresholds with a `__call__`; see the protocol `Detector` in types.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from equipoise.monitor.chance import FALSE_ALARMS, check_rate, highest_share, needed_nats, uneven_nats
from equipoise.monitor.stats import max_violation_floor
from equipoise.types import Finding, RoutingStats

MIN_EXPECTED = 100.0  # assignments per expert, with fewer there is no opinion


@dataclass(frozen=True)
class CollapseDetector:
    """Finds layers whose router has collapsed onto few experts, and experts that have died.

    Finding "collapse" (critical), if either holds and chance does not explain it:
    - the busiest expert takes more of the tokens than `token_share_limit`. Shares of tokens, because with K distinct
      experts per token a share of assignments never exceeds 1/K.
    - effective_experts / E is below `effective_ratio`: the load fits on half of the experts.
    Finding "dead_experts" (warning): experts below a tenth of the fair load, as RoutingStats.dead_experts has them.

    false_alarms: the probability per window, for all layers and experts together, that chance alone makes a fair router
    a collapse; a bound, see chance.py. With 100 assignments per expert the other thresholds alone keep far more: by the
    exact binomial below 1e-12 per layer, and 1.2e-30 per expert for dead ones. With fewer, this is what counts.
    min_expected: mu, the assignments per expert to be expected in the window; with fewer there is no opinion.
    hot_excess: how far from its fair share K/E towards all tokens the busiest expert may be, in (0, 1).
    hot_load: and at least this load relative to fair. Without it K close to E, where an expert that takes every
        token has hardly more than its share, would alarm.
    Raises ValueError for a threshold outside its range.
    """

    min_expected: float = MIN_EXPECTED
    effective_ratio: float = 0.5
    hot_excess: float = 0.5
    hot_load: float = 1.5
    false_alarms: float = FALSE_ALARMS

    def __post_init__(self) -> None:
        for name, low, high in (
            ("min_expected", 0.0, math.inf),
            ("effective_ratio", 0.0, 1.0),
            ("hot_excess", 0.0, 1.0),
            ("hot_load", 1.0, math.inf),
        ):
            value = getattr(self, name)
            if not low < value < high:
                raise ValueError(f"{name}: expected a number between {low:g} and {high:g}, got {value!r}")
        check_rate("false_alarms", self.false_alarms)

    def __call__(self, window: Sequence[RoutingStats]) -> list[Finding]:
        """Judge one flush, a record per layer. Collapsed layers come first, then dead experts."""
        judged = [stats for stats in window if expected_per_expert(stats) >= self.min_expected]
        nats = needed_nats(sum(stats.num_experts + 1 for stats in judged), self.false_alarms)
        collapsed = [self._collapse(stats, nats) for stats in judged]
        return [f for f in collapsed if f is not None] + [_dead(stats) for stats in judged if stats.dead_experts]

    def token_share_limit(self, stats: RoutingStats, nats: float = 0.0) -> float:
        """The share of tokens above which the busiest expert counts as collapse. Above 1 (never) for K near E.

        Halfway from the fair share K/E to all tokens, at least `hot_load` fair shares, plus what the busiest expert of
        a fair layer has by chance: sqrt(2 ln E / mu) fair shares, times sqrt(1 - K/E) as an expert gets a token at most
        once. And no less than what chance explains for all layers and experts. nats: how rarely, see `needed_nats`.
        """
        return max(self._limit(stats), highest_share(fair_token_share(stats), stats.num_tokens, nats))

    def _limit(self, stats: RoutingStats) -> float:
        """The same, whatever chance explains for the others."""
        fair = fair_token_share(stats)
        floor = max_violation_floor(stats.num_experts, expected_per_expert(stats)) * math.sqrt(max(0.0, 1.0 - fair))
        return max(fair + self.hot_excess * (1.0 - fair), self.hot_load * fair) + fair * floor

    def _collapse(self, stats: RoutingStats, nats: float) -> Finding | None:
        share, share_limit = stats.max_token_share, self._limit(stats)
        if share > share_limit:  # else the rest, which is searched for, would not change a thing
            share_limit = self.token_share_limit(stats, nats)
        ratio = stats.effective_experts / stats.num_experts
        if share > share_limit:
            value, threshold = share, share_limit
        elif ratio < self.effective_ratio and uneven_nats(stats.counts_E) >= nats:
            value, threshold = ratio, self.effective_ratio
        else:
            return None
        expert = int(stats.counts_E.argmax())
        return Finding(
            rule="collapse",
            layer=stats.layer,
            expert=expert,
            severity="critical",
            value=value,
            threshold=threshold,
            message=(
                f"{stats.layer} has collapsed: expert {expert} takes {share:.1%} of the tokens, fair is "
                f"{fair_token_share(stats):.1%}; {stats.effective_experts:.1f} effective experts of {stats.num_experts}"
            ),
            remedy=(
                "Rebalance this router with a one-shot quantile bias; if it collapses again, raise the balancing "
                "coefficient or go back to the last known-good router."
            ),
        )


def expected_per_expert(stats: RoutingStats) -> float:
    """mu = T * K / E, the assignments that each expert was to expect in this window."""
    return stats.num_assignments / stats.num_experts


def fair_token_share(stats: RoutingStats) -> float:
    """K/E, the share of tokens that a fair router sends to each expert (K: assignments per token); 0 without tokens."""
    return expected_per_expert(stats) / stats.num_tokens if stats.num_tokens else 0.0


def layers_without_opinion(window: Sequence[RoutingStats], min_expected: float = MIN_EXPECTED) -> set[str]:
    """Layers with too few assignments to be judged. Their alerts must neither fire nor resolve on this window."""
    return {stats.layer for stats in window if expected_per_expert(stats) < min_expected}


def _dead(stats: RoutingStats) -> Finding:
    dead = stats.dead_experts
    names = ", ".join(map(str, dead[:8])) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
    return Finding(
        rule="dead_experts",
        layer=stats.layer,
        expert=None,
        severity="warning",
        value=float(len(dead)),
        threshold=0.0,
        message=(
            f"{stats.layer}: {len(dead)} of {stats.num_experts} experts get less than a tenth of their fair load: "
            f"{names}"
        ),
        remedy=(
            "Give them tokens again with a bias balancer or a one-shot quantile bias; "
            "a balancing loss alone is slow once the router is saturated."
        ),
    )
