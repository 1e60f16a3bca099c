"""Claims about where experts live: what putting those that are chosen together on one rank saves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equipoise.bench.claims.balance import PRODUCTION
from equipoise.bench.claims.claim import Bench, Claim, Reading
from equipoise.bench.claims.statistics import above
from equipoise.plan import Aim, Cluster, plan_layers, score_layers, traffic_of_ids
from equipoise.types import Placement

THEME = "placement"
TOKENS, WINDOWS = 4096, 8


@dataclass(frozen=True)
class Choices:
    """bundle: experts that are chosen as a whole; 1 is each on its own."""

    num_experts: int
    k: int
    num_ranks: int
    bundle: int

    def ids(self, seed: int) -> np.ndarray:
        """int64 (T, K): some bundles are more popular than others, and their names say nothing."""
        rng = np.random.default_rng(seed)
        num_bundles = self.num_experts // self.bundle
        wants_TB = rng.normal(0, 0.3, num_bundles) + rng.gumbel(size=(TOKENS, num_bundles))
        wants_TE = np.repeat(wants_TB, self.bundle, axis=1) + 0.1 * rng.gumbel(size=(TOKENS, self.num_experts))
        ids_TK = np.argpartition(-wants_TE, self.k - 1, axis=1)[:, : self.k]
        return np.asarray(rng.permutation(self.num_experts)[ids_TK])


def fewer_copies(bench: Bench, choices: Choices) -> list[Reading]:
    """Share of a token's copies that planning on the first half of the traffic saves on the second."""
    cluster = Cluster(choices.num_ranks, choices.num_experts)
    per_rank = cluster.slots_per_rank
    in_order = Placement(
        tuple(tuple(range(rank * per_rank, (rank + 1) * per_rank)) for rank in range(choices.num_ranks))
    )
    values = []
    for seed in range(bench.trials):
        ids_TK = choices.ids(seed)
        seen, to_come = (traffic_of_ids("0", part, choices.num_experts, WINDOWS) for part in np.array_split(ids_TK, 2))
        planned = plan_layers([seen], cluster, aim=Aim(slack=1.1))
        fan_outs = [score_layers(each, [to_come])[0].fan_out for each in (planned, {"0": in_order})]
        assert fan_outs[0] is not None
        assert fan_outs[1] is not None
        values.append(1 - fan_outs[0] / fan_outs[1])
    return [Reading("share of copies of tokens saved", "", tuple(values), above(0.05))]


CLAIMS = (
    Claim(
        name="co-location-saves-bytes",
        theme=THEME,
        hypothesis="Experts that are chosen together, put on one rank, save communication",
        where=f"{PRODUCTION}: co-locate experts that are frequently selected together",
        theirs="a cure for 300 ms; no figure",
        method="64 experts on 8 ranks, top-8, bundles of 4; planned on half of the traffic, counted on the rest",
        control_is="experts that are chosen each on its own",
        measure=fewer_copies,
        setup=Choices(64, 8, 8, 4),
        control=Choices(64, 8, 8, 1),
        seconds=3.0,
    ),
    Claim(
        name="co-location-of-8-experts-on-4-ranks",
        theme=THEME,
        hypothesis="The same for 8 experts on 4 ranks, top-2, as in the report",
        where=f"{PRODUCTION}: its own set-up",
        theirs="no figure",
        method="8 experts on 4 ranks, top-2, pairs that are chosen together",
        control_is="experts that are chosen each on its own",
        measure=fewer_copies,
        setup=Choices(8, 2, 4, 2),
        control=Choices(8, 2, 4, 1),
        seconds=1.0,
    ),
)
