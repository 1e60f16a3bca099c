"""Which repair an incident calls for next. Pure: a policy proposes, `recovery.py` applies, watches and undoes.

A policy is a function of the situation to the name of a repair in `catalogue.REPAIRS`, or to one of the words below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from equipoise.monitor.incidents import LOOK_AT_INPUT, PAGE, Incident

PolicyName = Literal["ladder", "round_robin_then_reload"]


@dataclass(frozen=True)
class Situation:
    """What a policy knows.

    incident: with the actions tried for it. training: weights are being trained; else they are served.
    damaged: whether held-out text shows the finding too; None: it was not measured.
    kept_before: kinds that were kept for the same alert a short while ago, and did not last.
    """

    incident: Incident
    training: bool
    damaged: bool | None = None
    kept_before: tuple[str, ...] = ()

    @property
    def tried(self) -> tuple[str, ...]:
        """The kinds that are used up: tried for this incident, or kept before and not lasting."""
        return self.kept_before + tuple(action.kind for action in self.incident.actions if action.state != "proposed")


class Policy(Protocol):
    """interim: kinds that are only to hold until the next one is applied."""

    @property
    def interim(self) -> frozenset[str]: ...  # noqa: D102 - described by the class

    def __call__(self, situation: Situation) -> str | None: ...  # noqa: D102 - described by the class


Rungs = Mapping[str, tuple[str, ...]]

# What may help against each rule of the monitor, the gentlest first. What an action can't do in a layer it says itself.
TRAINING_RUNGS: Rungs = {
    "collapse": ("quantile_bias", "next_choice", "spill", "router_rollback", "full_rollback", "round_robin"),
    "dead_experts": ("quantile_bias", "reseed", "router_rollback"),
    "logits": ("temperature", "router_rollback", "full_rollback"),
    "drops": ("quantile_bias", "next_choice", "spill", "boost"),
    "load_drift": (),
    "not_finite": ("reseed", "router_rollback", "full_rollback"),
    "diverged": ("lr_cut", "full_rollback"),
}
SERVING_RUNGS: Rungs = {
    "collapse": ("quantile_bias", "next_choice", "spill", "router_rollback", "full_rollback", "round_robin"),
    "dead_experts": ("quantile_bias", "router_rollback", "full_rollback"),
    "logits": ("temperature", "router_rollback", "full_rollback"),
    "drops": ("quantile_bias", "next_choice", "spill"),
    "load_drift": ("router_rollback", "full_rollback"),
    "not_finite": ("shut_expert", "router_rollback", "full_rollback", "dense"),
}


@dataclass(frozen=True)
class Ladder:
    """The gentlest repair first; the next one when it did not help; a human when none is left.

    rungs: by rule of the monitor, for training and for serving; a rule that is not named is only alerted.
    budget: of attempts per incident. Where held-out text does not show the finding, the input is to blame, and
    nothing is repaired.
    """

    training: Rungs = field(default_factory=lambda: dict(TRAINING_RUNGS))
    serving: Rungs = field(default_factory=lambda: dict(SERVING_RUNGS))
    budget: int = 6

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"Ladder.budget: expected at least 1 attempt, got {self.budget}")

    @property
    def interim(self) -> frozenset[str]:
        """None: each rung is on trial for itself."""
        return frozenset()

    def __call__(self, situation: Situation) -> str | None:
        """The next rung, `PAGE`, `LOOK_AT_INPUT`, or None where there is nothing to do."""
        rungs = (self.training if situation.training else self.serving).get(situation.incident.finding.rule, ())
        if not rungs:
            return None
        if situation.damaged is False:
            return LOOK_AT_INPUT
        return _next(rungs, situation.tried, self.budget)


@dataclass(frozen=True)
class RoundRobinThenReload:
    """A widely read answer to collapse, taken literally: round robin at once, then the last known-good checkpoint."""

    rules: tuple[str, ...] = ("collapse", "logits", "not_finite")

    @property
    def interim(self) -> frozenset[str]:
        """Round robin holds until the checkpoint is loaded."""
        return frozenset({"round_robin"})

    def __call__(self, situation: Situation) -> str | None:
        """round_robin, then full_rollback, then a human."""
        if situation.incident.finding.rule not in self.rules:
            return None
        tried = tuple(action.kind for action in situation.incident.actions if action.state != "proposed")
        return _next(("round_robin", "full_rollback"), tried, 2)


@dataclass(frozen=True)
class OneRung:
    """One repair for one rule, whatever the rest; for measuring what each can do."""

    kind: str
    rules: tuple[str, ...] = ("collapse", "dead_experts", "logits", "drops", "load_drift", "not_finite", "diverged")

    @property
    def interim(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def __call__(self, situation: Situation) -> str | None:
        """The repair, once."""
        if situation.incident.finding.rule not in self.rules:
            return None
        return _next((self.kind,), situation.tried, 1)


def policy_of(name: PolicyName) -> Policy:
    """The policy of that name. Raises ValueError for another."""
    policies: dict[str, Policy] = {"ladder": Ladder(), "round_robin_then_reload": RoundRobinThenReload()}
    if name not in policies:
        raise ValueError(f"policy: expected one of {', '.join(policies)}, got {name!r}")
    return policies[name]


def _next(rungs: Sequence[str], tried: Sequence[str], budget: int) -> str | None:
    """The first rung that is not used up; then a page, once."""
    if PAGE in tried:
        return None
    if sum(kind in rungs for kind in tried) >= budget:
        return PAGE
    return next((kind for kind in rungs if kind not in tried), PAGE)
