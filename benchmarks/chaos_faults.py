"""The faults of the chaos table, and what each is tried against. For benchmarks/chaos_runs.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from equipoise.faults import (
    BiasRunaway,
    CheckpointDamage,
    Collapse,
    DeadExpert,
    Drift,
    Injection,
    LogitBlowUp,
    NaNExpert,
    RouterCorruption,
    SkewedInput,
    SlowExpert,
    StaleCounters,
    checkpoint_of,
    damage,
    inject,
    inject_counters,
    skewed_rows,
)
from equipoise.models.decoder import Decoder
from equipoise.monitor.watch import Watch
from equipoise.recovery.known_good import KnownGood
from equipoise.recovery.policy import PolicyName
from equipoise.train.data import Batch

LAYER, E = "layers.1.mlp", 8
POLICIES: tuple[PolicyName, ...] = ("ladder", "round_robin_then_reload")
NOBODY = "nobody"  # alerts only


@dataclass(frozen=True)
class Case:
    """One cell of the table. mode: "training" or "serving". rung: a repair, a policy, "breaker", or `NOBODY`."""

    fault: str
    rung: str
    mode: str
    seed: int

    @property
    def name(self) -> str:
        """Unique, for resuming."""
        return f"{self.mode}/{self.fault}/{self.rung}/{self.seed}"


@dataclass(frozen=True)
class Scenario:
    """A fault, as a function of the seed. blames: the layer that may be repaired; "" where nothing is damaged."""

    make: Callable[[int], object]
    blames: str = LAYER
    modes: tuple[str, ...] = ("training", "serving")


def _expert(seed: int) -> int:
    return (3 * seed + 1) % E


SCENARIOS: dict[str, Scenario] = {
    "nothing": Scenario(lambda seed: None, blames=""),
    "collapse onto one": Scenario(lambda seed: Collapse(LAYER, _expert(seed), 40.0)),
    "collapse onto two": Scenario(lambda seed: Collapse(LAYER, _expert(seed), 40.0, also=((_expert(seed) + 3) % E,))),
    "slow drift": Scenario(lambda seed: Drift(LAYER, _expert(seed), 40.0, steps=15)),
    "dead expert": Scenario(lambda seed: DeadExpert(LAYER, _expert(seed), 40.0)),
    "logit blow-up": Scenario(lambda seed: LogitBlowUp(LAYER, 30.0)),
    "router corrupted": Scenario(lambda seed: RouterCorruption(LAYER, 4.0, seed=seed)),
    "bias run-away": Scenario(lambda seed: BiasRunaway(LAYER, _expert(seed), 40.0)),
    "NaN in an expert": Scenario(lambda seed: NaNExpert(LAYER, _expert(seed), seed=seed)),
    "slow expert": Scenario(lambda seed: SlowExpert(LAYER, _expert(seed), 0.03), modes=("serving",)),
    "stale counters": Scenario(lambda seed: StaleCounters("stale"), blames=""),
    "one domain": Scenario(lambda seed: SkewedInput(domain=0, intensity=1.0, seed=seed), blames=""),
    "collapse, and a damaged checkpoint": Scenario(lambda seed: Collapse(LAYER, _expert(seed), 40.0)),
}


@dataclass
class Fault:
    """A fault in place, in either mode. skew: what it does to batches."""

    injection: Injection | None = None
    skew: SkewedInput | None = None

    def advance(self) -> None:
        """Once per step."""
        if self.injection is not None:
            self.injection.advance()

    def batch(self, batch: Batch) -> Batch:
        """The batch as the model gets it."""
        if self.skew is None:
            return batch
        domains = batch.domains_BS[:, 0]
        skew = replace(self.skew, domain=int(torch.bincount(domains).argmax()))
        rows = skewed_rows(skew, domains)
        return Batch(batch.tokens_BS[rows], batch.targets_BS[rows], batch.domains_BS[rows])


def put_in(case: Case, model: Decoder, watch: Watch, out: Path, run: Callable[[], object]) -> Fault:
    """The case's fault, in the model, the monitor, the data or on the disk."""
    fault = SCENARIOS[case.fault].make(case.seed)
    if "damaged checkpoint" in case.fault:
        name = KnownGood(out).latest().checkpoint
        kinds = ("flip", "truncate", "missing", "wrong_size")
        damage(checkpoint_of(out, name or ""), CheckpointDamage(kinds[case.seed % 4], seed=case.seed))
    if fault is None:
        return Fault()
    if isinstance(fault, SkewedInput):
        return Fault(skew=fault)
    if isinstance(fault, StaleCounters):
        return Fault(inject_counters(watch, fault))
    with watch.recorder.paused():
        return Fault(inject(model, fault, run))


def rungs_for(fault: str, mode: str) -> Iterator[str]:
    """The columns that a fault is tried against."""
    yield NOBODY
    if fault == "slow expert":
        yield "breaker"
        return
    yield from POLICIES
    if SCENARIOS[fault].blames:
        yield from ("quantile_bias", "boost", "temperature", "next_choice", "spill", "router_rollback", "full_rollback")
        yield from ("reseed", "lr_cut") if mode == "training" else ("shut_expert",)
        yield from ("dense", "round_robin")
