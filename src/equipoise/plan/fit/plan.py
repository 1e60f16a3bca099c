"""One plan: a model, a setup and a machine, and everything that follows from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from equipoise.plan.fit.advice import Advice, advise
from equipoise.plan.fit.architecture import Architecture
from equipoise.plan.fit.communication import Communication, Machine
from equipoise.plan.fit.facts import Facts
from equipoise.plan.fit.folklore import RuleOfThumb, rules_of_thumb
from equipoise.plan.fit.memory import Memory
from equipoise.plan.fit.parameters import Parameters
from equipoise.plan.fit.remedies import Remedy, remedies
from equipoise.plan.fit.setup import Setup, Training


@dataclass(frozen=True)
class Plan:
    """limit: bytes of a rank, None where it isn't known. remedies: what lowers its memory, where it does not fit."""

    model: Architecture
    setup: Setup
    machine: Machine
    limit: int | None
    parameters: Parameters
    memory: Memory
    communication: Communication
    remedies: tuple[Remedy, ...]
    advice: tuple[Advice, ...]
    rules_of_thumb: tuple[RuleOfThumb, ...]

    @property
    def fits(self) -> bool | None:
        """None without a limit."""
        return None if self.limit is None else self.memory.total <= self.limit

    def fields(self) -> dict[str, Any]:
        """For JSON: bytes, seconds, counts."""
        return {
            "total_params": self.parameters.total,
            "active_params": self.parameters.active,
            "memory_bytes": self.memory.total,  # of a rank, at its fullest
            "model": asdict(self.model),
            "work": "training" if isinstance(self.setup.work, Training) else "serving",
            "setup": asdict(self.setup),
            "machine": asdict(self.machine),
            "limit": self.limit,
            "fits": self.fits,
            "parameters": self.parameters.fields(),
            "memory": self.memory.fields(),
            "communication": self.communication.fields(),
            "remedies": [each.fields() for each in self.remedies],
            "advice": [each.fields() for each in self.advice],
            "rules_of_thumb": [each.fields() for each in self.rules_of_thumb],
        }


def make_plan(
    model: Architecture,
    setup: Setup,
    machine: Machine | None = None,
    limit: int | None = None,
    target_s: float | None = None,
) -> Plan:
    """Plan a model. limit: bytes of memory of a rank. target_s: seconds that a step may take.

    Raises ValueError where model and setup contradict each other, and for a limit or target that isn't above 0.
    """
    for name, value in (("limit", limit), ("target_s", target_s)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected more than 0, got {value}")
    facts = Facts(model, setup, machine or Machine(), limit, target_s)
    changes = () if limit is None or facts.memory.total <= limit else tuple(remedies(model, setup, limit))
    return Plan(
        model=model,
        setup=setup,
        machine=facts.machine,
        limit=limit,
        parameters=facts.counts,
        memory=facts.memory,
        communication=facts.communication,
        remedies=changes,
        advice=tuple(advise(facts)),
        rules_of_thumb=tuple(rules_of_thumb(facts)),
    )
