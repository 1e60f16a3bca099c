"""Whether a tuned model has left the routing of the model that it began with: the same held-out tokens, then and now.

Two measures per layer. Agreement: the share of the base's (token, expert) choices that are still made. Distance: the
total variation of the load shares, half the sum of |f - g|, which is the share of the load that has moved. Tokens are
the same, so nothing but the model differs; what chance explains is how far these tokens stand for all text like them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from equipoise.monitor.chance import FALSE_ALARMS, check_rate, needed_nats, share_nats
from equipoise.monitor.stats import load_entropy, load_share
from equipoise.types import Finding, RoutingStats


@dataclass(frozen=True)
class Shift:
    """One layer on one text, compared with the base. text: whose it is, "task" or "base".

    agreement, distance: in [0, 1], see above. entropy, base_entropy: of the load, H(f) / ln E.
    """

    layer: str
    text: str
    num_tokens: int
    num_experts: int
    num_assignments: int
    agreement: float
    distance: float
    entropy: float
    base_entropy: float

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Shift:
        """What `dataclasses.asdict` made."""
        return Shift(**record)


def load_distance(counts_E: np.ndarray, base_E: np.ndarray) -> float:
    """Half the sum of |f - g| over the load shares of two counts (E,), in [0, 1]; 0 where one is empty."""
    if not (counts_E.sum() and base_E.sum()):
        return 0.0
    return float(np.abs(load_share(counts_E.astype(float)) - load_share(base_E.astype(float))).sum() / 2)


def agreement(now_N: np.ndarray, base_N: np.ndarray) -> float:
    """The share of the choices base_N that are among now_N, in [0, 1]; 1 where there are none.

    Choices are whole numbers, token * E + expert, each at most once. So routers may give tokens different numbers of
    experts.
    """
    return len(np.intersect1d(now_N, base_N, assume_unique=True)) / len(base_N) if len(base_N) else 1.0


def distance_floor(num_experts: int, num_assignments: float, num_tokens: float, nats: float) -> float:
    """How far the load shares of so many tokens are from those of the text they stand for, at most, by chance.

    In total variation, exceeded with probability exp(-nats) at most: (sqrt(E / N) + sqrt(2 nats / T)) / 2. Its mean is
    below the first half: the sum over experts of a standard deviation, by Cauchy and Schwarz. One token moves the sum
    of |f - g| by 2 / T at most, and then C. McDiarmid, "On the method of bounded differences" (1989), lemma 1.2. For
    tokens that are independent. Infinite without tokens.
    """
    if not (num_tokens > 0 and num_assignments > 0):
        return math.inf
    return (math.sqrt(num_experts / num_assignments) + math.sqrt(2 * nats / num_tokens)) / 2


def shift_of(layer: str, text: str, choices: tuple[np.ndarray, np.ndarray], num_experts: int, num_tokens: int) -> Shift:
    """Compare. choices: (now, in the base), as `agreement` takes them."""
    now_E, base_E = (np.bincount(each_N % num_experts, minlength=num_experts) for each_N in choices)
    return Shift(
        layer=layer,
        text=text,
        num_tokens=num_tokens,
        num_experts=num_experts,
        num_assignments=len(choices[1]),
        agreement=agreement(*choices),
        distance=load_distance(now_E, base_E),
        entropy=float(load_entropy(now_E.astype(float))),
        base_entropy=float(load_entropy(base_E.astype(float))),
    )


@dataclass(frozen=True)
class ShiftRule:
    """Finding "domain_shift" (warning): a tuned router has left the base's routing, by more than chance explains.

    shifts: gives the newest comparisons, of any number of texts; a layer has one finding, of the text on which it is
    furthest gone. min_agreement: choices that must be the same. max_distance: the share of the load that may move.
    false_alarms: the probability per window that chance alone makes one of them pass its limit, for all layers.
    Raises ValueError for a number outside its range.
    """

    shifts: Callable[[], Sequence[Shift]]
    min_agreement: float = 0.5
    max_distance: float = 0.25
    false_alarms: float = FALSE_ALARMS

    def __post_init__(self) -> None:
        check_rate("false_alarms", self.false_alarms)
        for name in ("min_agreement", "max_distance"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"ShiftRule.{name}: expected between 0 and 1, got {getattr(self, name)!r}")

    def __call__(self, window: Sequence[RoutingStats]) -> list[Finding]:
        """At most one per layer of the window."""
        shifts = self.shifts()
        nats = needed_nats(2 * len(shifts), self.false_alarms)
        worst: dict[str, Finding] = {}
        for shift in shifts:
            finding = self._judge(shift, nats)
            if finding is not None and (shift.layer not in worst or finding.value > worst[shift.layer].value):
                worst[shift.layer] = finding
        return [worst[stats.layer] for stats in window if stats.layer in worst]

    def _judge(self, shift: Shift, nats: float) -> Finding | None:
        changed, limit = 1.0 - shift.agreement, 1.0 - self.min_agreement
        floor = distance_floor(shift.num_experts, shift.num_assignments, shift.num_tokens, nats)
        if changed > limit and share_nats(changed, limit, shift.num_tokens) >= nats:
            value, threshold = changed, limit
        elif shift.distance > self.max_distance + floor:
            value, threshold = shift.distance, self.max_distance + floor
        else:
            return None
        return Finding(
            rule="domain_shift",
            layer=shift.layer,
            expert=None,
            severity="warning",
            value=value,
            threshold=threshold,
            message=(
                f"{shift.layer} has left the base's routing: of its choices on the {shift.text}'s text "
                f"{shift.agreement:.0%} are the same, {shift.distance:.0%} of the load has moved; load entropy "
                f"{shift.base_entropy:.2f} -> {shift.entropy:.2f}"
            ),
            remedy=(
                "Freeze the router for longer or for good, lower its learning rate or the whole run's, or mix in text "
                "of the base's own; if the base's text has become worse, go back to an earlier checkpoint."
            ),
        )
