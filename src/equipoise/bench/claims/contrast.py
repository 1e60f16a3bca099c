"""Claims about training: a weighted sum of numbers of runs that share a seed, against what is claimed of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from equipoise.bench.claims.claim import Arm, Bench, Claim, Reading
from equipoise.bench.claims.statistics import Range, above, below

LOSS_MARGIN = 0.05  # nats, of some 3.2: what is within it is called as good; a few times what runs differ by chance

Term = tuple[float, str, str]  # weight, role, metric
Roles = Mapping[str, Arm]


@dataclass(frozen=True)
class Contrast:
    """sum of weight x metric over the terms, seed by seed.

    claimed: a range; or "more" and "less": beyond the noise floor of `noise`, or of the first term's metric, for as
    many differences as the weights come to; or "no more": at most by the noise floor.
    """

    name: str
    terms: tuple[Term, ...]
    claimed: Range | Literal["more", "less", "no more"]
    unit: str = ""
    noise: str = ""

    def reading(self, bench: Bench, roles: Roles) -> Reading:
        """One value per seed that all of its runs have. Raises NotRunError."""
        seeds: Sequence[int] = bench.seeds
        for _, role, _ in self.terms:
            seeds = roles[role].seeds(seeds)
        values = tuple(
            sum(weight * bench.result(roles[role], seed)[metric] for weight, role, metric in self.terms)
            for seed in seeds
        )
        return Reading(self.name, self.unit, values, self._range(bench))

    def _range(self, bench: Bench) -> Range:
        if isinstance(self.claimed, Range):
            return self.claimed
        floor = bench.floor(self.noise or self.terms[0][2]) * sum(abs(weight) for weight, *_ in self.terms) / 2
        if self.claimed == "no more":
            return below(floor)
        return above(floor, noise=floor) if self.claimed == "more" else below(-floor, noise=floor)


def difference(metric: str, name: str, claimed: Range | Literal["more", "less"], unit: str = "") -> Contrast:
    """The treated run's number minus the baseline's."""
    return Contrast(name, ((1.0, "treated", metric), (-1.0, "baseline", metric)), claimed, unit)


def slope(metric: str, name: str, claimed: Range | Literal["more", "less"], at: Mapping[str, float]) -> Contrast:
    """The number's slope, by least squares, over the roles at their places."""
    mean = sum(at.values()) / len(at)
    spread = sum((place - mean) ** 2 for place in at.values())
    return Contrast(name, tuple(((place - mean) / spread, role, metric) for role, place in at.items()), claimed)


def as_good(margin: float = LOSS_MARGIN) -> Contrast:
    """The treated run's validation loss is no worse than the baseline's by the margin: non-inferiority."""
    return difference("loss", f"loss, difference (margin {margin:g})", below(margin), "nats")


def measure_contrasts(bench: Bench, roles: Roles, contrasts: Sequence[Contrast]) -> list[Reading]:
    """A reading per contrast."""
    return [contrast.reading(bench, roles) for contrast in contrasts]


def training_claim(
    contrasts: Sequence[Contrast], setup: Roles, control: Roles, present: Roles | None = None, **fields: Any
) -> Claim:
    """A claim of contrasts over runs, with the runs of set-up and controls listed once each."""
    arms = (*setup.values(), *control.values(), *(present or {}).values())
    return Claim(
        measure=partial(measure_contrasts, contrasts=tuple(contrasts)),
        setup=setup,
        control=control,
        present=present,
        arms=tuple(dict.fromkeys(arm.run for arm in arms)),
        **fields,
    )
