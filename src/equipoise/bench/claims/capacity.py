"""Claims about capacity that need no training: what chance alone drops, and what a published listing counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from equipoise.bench.claims.balance import PRODUCTION
from equipoise.bench.claims.claim import Bench, Claim, Reading
from equipoise.bench.claims.statistics import Range, above, below
from equipoise.layer import Capacity
from equipoise.layer.drop_rate import expected_drop_rate
from equipoise.layer.overflow import fit
from equipoise.types import RoutingDecision

THEME = "capacity"
EXPERTS, K = 8, 2
EACH = 50  # draws per trial: one takes no time, and drops are rare


@dataclass(frozen=True)
class Load:
    """factor: of the capacity. num_tokens: of one forward. even: experts in turn, so that chance has no part."""

    factor: float
    num_tokens: int
    even: bool = False


def decision_of(load: Load, seed: int) -> RoutingDecision:
    """Every token to K distinct experts, evenly at random, or in turn."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.rand(load.num_tokens, EXPERTS, generator=generator)
    ids_TK = logits_TE.topk(K).indices
    if load.even:
        ids_TK = torch.arange(load.num_tokens * K).view(-1, K) % EXPERTS
    weights_TK = torch.full(ids_TK.shape, 1 / K)
    return RoutingDecision.from_topk(ids_TK, weights_TK, probs_TE=logits_TE.softmax(-1), logits_TE=logits_TE)


def dropped_share(load: Load, seed: int) -> float:
    """Share of the assignments that our layer's capacity drops."""
    fitted = fit(decision_of(load, seed), Capacity(load.factor), training=True)
    return float(fitted.drops["capacity"]) / (load.num_tokens * K)


def drops(bench: Bench, load: Load, claimed: Range) -> list[Reading]:
    """Drops of fair routers."""
    values = tuple(dropped_share(load, seed) for seed in range(EACH * bench.trials))
    return [Reading("share of assignments dropped", "", values, claimed)]


def drops_as_computed(bench: Bench, loads: Sequence[tuple[Load, float]]) -> list[Reading]:
    """Drops against a figure each."""
    return [
        Reading(
            f"factor {load.factor:g}, {load.num_tokens * K // EXPERTS} per expert: dropped over computed",
            "",
            tuple(dropped_share(load, seed) / figure for seed in range(EACH * bench.trials)),
            Range(0.8, 1.25),
        )
        for load, figure in loads
    ]


@dataclass(frozen=True)
class Counting:
    """How a layer rounds its limit, and when it counts what it drops: before the surplus is cut, after, or never."""

    rounding: Literal["down", "ours"] = "down"
    factor: float = 1.5
    counts: Literal["before", "after", "never"] = "after"

    def limit(self, num_tokens: int) -> int:
        """Assignments per expert."""
        if self.rounding == "ours":
            return Capacity(self.factor).limit(num_tokens, num_tokens * K, EXPERTS)
        return int(num_tokens * K / EXPERTS * self.factor)

    def reported(self, wanted_E: Sequence[int], limit: int) -> int:
        """What it says that it dropped."""
        if self.counts == "never":
            return 0
        there = [wanted if self.counts == "before" else min(wanted, limit) for wanted in wanted_E]
        return sum(count - limit for count in there if count > limit)


def kept_when_decoding(bench: Bench, layer: Counting) -> list[Reading]:
    """Share of a single token's assignments that are computed."""
    return [
        Reading("share of a single token's experts that compute", "", (min(layer.limit(1), 1),), above(0.5), "exact")
    ]


def reported_drops(bench: Bench, layer: Counting) -> list[Reading]:
    """What is reported over what is lost, under a load that overflows."""
    values = []
    for seed in range(bench.trials):
        decision = decision_of(Load(layer.factor, 64), seed)
        counts_E = torch.bincount(decision.expert_ids_N, minlength=EXPERTS).tolist()
        limit = layer.limit(64)
        lost = sum(max(0, count - limit) for count in counts_E)
        if lost:
            values.append(layer.reported(counts_E, limit) / lost)
    return [Reading("reported over lost", "", tuple(values), Range(0.99, 1.01))]


def _computed(factor: float, num_tokens: int) -> tuple[Load, float]:
    return Load(factor, num_tokens), expected_drop_rate(factor, num_tokens, K, EXPERTS)


CLAIMS = (
    Claim(
        name="r8-exact-capacity-drops",
        theme=THEME,
        hypothesis="A capacity of exactly the fair load drops tokens even if the router is fair",
        where=f"{PRODUCTION}: any variance caused dropping at factor 1",
        theirs="no figure",
        method="fair routers, 8 experts, top-2, 1024 tokens, factor 1: more than 1 % dropped",
        control_is="experts in turn: no variance",
        measure=partial(drops, claimed=above(0.01)),
        setup=Load(1.0, 1024),
        control=Load(1.0, 1024, even=True),
        seconds=0.2,
    ),
    Claim(
        name="factor-1.5-drops-nothing",
        theme=THEME,
        hypothesis="A capacity factor of 1.5 takes bursts without dropping",
        where=f"{PRODUCTION}: 1.5 times the expected tokens handles bursts",
        theirs="no drops; alarm at 1 %",
        method="fair routers, 8 tokens as in its own example of use: below 0.1 %, its strictest alarm",
        control_is="factor 1, which drops",
        measure=partial(drops, claimed=below(0.001)),
        setup=Load(1.5, 8),
        control=Load(1.0, 8),
        present=Load(1.5, 1024),
        present_is="256 assignments per expert, where chance evens out",
        seconds=0.2,
    ),
    Claim(
        name="r8-drops-follow-the-binomial",
        theme=THEME,
        hypothesis="What a fair router drops follows from factor and assignments per expert",
        where="arithmetic of this package, docs/routing.md",
        theirs="0.4 / sqrt(assignments per expert) at factor 1",
        method="counted over computed, at factors 1 and 1.1 and 16 to 1024 assignments per expert",
        control_is="the figures of twice the factor's surplus",
        measure=drops_as_computed,
        setup=tuple(_computed(factor, tokens) for factor, tokens in ((1.0, 64), (1.0, 1024), (1.0, 4096), (1.1, 256))),
        control=((Load(1.0, 64), expected_drop_rate(1.25, 64, K, EXPERTS)),),
        seconds=0.5,
    ),
    Claim(
        name="r12-a-single-token-is-computed",
        theme=THEME,
        hypothesis="The published layer can decode one sequence",
        where=f"{PRODUCTION}: its layer, called runnable with all the production gotchas",
        theirs="no figure",
        method="its capacity, int(T k / E x 1.5), for one token",
        control_is="a third of the factor: no token of a single one can fit",
        measure=kept_when_decoding,
        setup=Counting(),
        control=Counting(factor=0.5),
        present=Counting(rounding="ours"),
        present_is="our capacity: rounded up, at least 1",
        seconds=0.01,
    ),
    Claim(
        name="r12-dropped-tokens-are-reported",
        theme=THEME,
        hypothesis="The published layer warns of what it drops",
        where=f"{PRODUCTION}: its layer counts tokens_dropped and warns",
        theirs="12 % were dropped silently for a week before",
        method="its counter, which looks after the surplus was cut away, over what was lost",
        control_is="no counter",
        measure=reported_drops,
        setup=Counting(factor=1.0),
        control=Counting(factor=1.0, counts="never"),
        present=Counting(factor=1.0, counts="before"),
        present_is="the same counter before the cut, as ours",
        seconds=0.1,
    ),
)
