"""What a claim is: a sentence that somebody published, how to measure it, and a control in which its effect is absent.

The same function measures the set-up and the control, and judges both by the same range; so a claim can't pass by the
way that it is built: its control must not pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from equipoise.bench.claims.statistics import Interval, Outcome, Range, bootstrap, exact, judge, student
from equipoise.train.config import TrainConfig

Verdict = Literal["supported", "contradicted", "open", "can't be tested here", "not run yet"]


class NotRunError(Exception):
    """A measurement needs a training run whose result is not there."""


@dataclass(frozen=True)
class Reading:
    """One number of a claim.

    values: one per seed or round; of paired runs, the differences. claimed: where the claim puts their mean.
    method: of the interval; "exact" is for what is computed and has one value.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    claimed: Range
    method: Literal["student", "bootstrap", "exact"] = "student"

    @property
    def interval(self) -> Interval:
        """Mean (median for the bootstrap) and 95 % interval."""
        if self.method == "exact":
            return exact(self.values[0])
        return bootstrap(self.values) if self.method == "bootstrap" else student(self.values)

    @property
    def outcome(self) -> Outcome:
        """What the interval says about the claim."""
        return judge(self.interval, self.claimed)


@dataclass(frozen=True)
class Arm:
    """A training run but for its seed.

    probe: what is measured at its end, by name (`all_probes.PROBES`). part: of the probe's numbers those whose names
    begin with it and a dot, without that; the run is the same. num_seeds: how many of the bench's seeds it is run with,
    0 for all. seconds: of one core, what the probe takes where that is much.
    """

    label: str
    config: TrainConfig
    probe: str = "plain"
    part: str = ""
    num_seeds: int = 0
    seconds: float = 0.0

    @property
    def run(self) -> Arm:
        """The arm as it is trained: with all of its numbers."""
        return replace(self, part="")

    def at(self, part: str) -> Arm:
        """The same run, of its numbers this part."""
        return replace(self, part=part)

    def seeds(self, seeds: Sequence[int]) -> tuple[int, ...]:
        """Those of these seeds that it is run with."""
        return tuple(seeds)[: self.num_seeds or None]


class Bench(Protocol):
    """What a measurement may ask for.

    seeds: of training runs. trials: how often something without training is tried.
    """

    @property
    def seeds(self) -> tuple[int, ...]: ...  # noqa: D102 - described by the class

    @property
    def trials(self) -> int: ...  # noqa: D102 - described by the class

    def result(self, arm: Arm, seed: int) -> Mapping[str, float]:
        """The numbers of a finished run, those of the arm's part. Raises NotRunError."""
        ...

    def floor(self, metric: str) -> float:
        """How far apart runs are in this number that differ in nothing that matters. Raises NotRunError."""
        ...


Measure = Callable[[Bench, Any], Sequence[Reading]]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim.

    where: the kind of source, and the gist in our words. theirs: the figure given there. setup, control: what
    `measure` takes; the control lacks what the claim is about. present: a set-up that has it for sure, where there is
    one: a claim is contradicted only by a measurement that would have found it. arms: the training runs of all.
    seconds: estimate for one core, training left out. untestable: why not; then there is nothing else to run.
    """

    name: str
    theme: str
    hypothesis: str
    where: str
    theirs: str
    method: str
    control_is: str = ""
    measure: Measure | None = None
    setup: Any = None
    control: Any = None
    present: Any = None
    present_is: str = ""
    arms: tuple[Arm, ...] = ()
    seconds: float = 0.0
    untestable: str = ""

    def __post_init__(self) -> None:
        if self.untestable:
            return
        if self.measure is None or self.control is None or not self.control_is:
            raise ValueError(
                f"claim {self.name}: expected measure, control and control_is, got a claim that could pass by "
                "construction; give it a control in which its effect is absent, or say why it is untestable"
            )

    @property
    def cheap(self) -> bool:
        """Whether it needs no training."""
        return not self.arms and not self.untestable


@dataclass(frozen=True)
class Found:
    """What came of a claim. readings, control, present: empty where nothing could be measured, or nothing is there."""

    claim: Claim
    verdict: Verdict
    readings: tuple[Reading, ...] = ()
    control: tuple[Reading, ...] = ()
    present: tuple[Reading, ...] = ()
    note: str = ""


def together(readings: Sequence[Reading]) -> Outcome:
    """Supported when all are, contradicted when any is, else open. No reading is open."""
    outcomes = {reading.outcome for reading in readings}
    if "contradicted" in outcomes:
        return "contradicted"
    return "supported" if outcomes == {"supported"} else "open"


def find(claim: Claim, bench: Bench) -> Found:
    """Measure a claim and its controls.

    A claim whose control passes too is open, whatever its own numbers say; so is one that is contradicted by a
    measurement that doesn't find the effect where it is present for sure.
    """
    if claim.untestable:
        return Found(claim, "can't be tested here", note=claim.untestable)
    assert claim.measure is not None
    try:
        readings = tuple(claim.measure(bench, claim.setup))
        control = tuple(claim.measure(bench, claim.control))
        present = () if claim.present is None else tuple(claim.measure(bench, claim.present))
    except NotRunError as error:
        return Found(claim, "not run yet", note=str(error))
    verdict, note = together(readings), ""
    if together(control) == "supported":
        verdict, note = "open", "the control shows the effect too: the measurement can't tell"
    if verdict == "contradicted" and present and together(present) != "supported":
        verdict, note = "open", "the effect isn't found where it is present for sure: the measurement can't tell"
    return Found(claim, verdict, readings, control, present, note)
