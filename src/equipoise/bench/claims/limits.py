"""Claims about capacity factor, tokens per forward and policy: what a trained model drops and loses, and what it costs
to be trained so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from equipoise.bench.claims.architectures import POSITION, PROBABILITY, SHARED, TIGHT, WORSE, capped
from equipoise.bench.claims.arms import BALANCED, HALF_TRAINED, SAME_A, arm, of
from equipoise.bench.claims.balance import NOTHING_DIFFERS, PRODUCTION
from equipoise.bench.claims.capacity import EACH, EXPERTS, THEME, K, Load
from equipoise.bench.claims.claim import Arm, Bench, Claim, Reading
from equipoise.bench.claims.contrast import LOSS_MARGIN, Contrast, as_good, difference, slope, training_claim
from equipoise.bench.claims.curves import Curve, Line, Panel
from equipoise.bench.claims.limits_probe import FACTORS, FORWARDS, POLICIES, TOKENS, part_of_grid
from equipoise.bench.claims.statistics import Range, above, below
from equipoise.layer import Capacity
from equipoise.layer.drop_rate import expected_drop_rate
from equipoise.layer.overflow import fit
from equipoise.routing import TopK

NUM_SEEDS = 3
WHOLE = FORWARDS[-1]  # tokens of a forward in training
SPARE = "shared"
LIMITED, LIMITED_SHARED = (
    replace(base, label=label, probe="limits", num_seeds=NUM_SEEDS, seconds=30.0)
    for base, label in ((BALANCED, "balanced, then limited"), (SHARED, "with a shared expert, then limited"))
)


def limited(name: str, **moe: Any) -> Arm:
    """A run of three seeds."""
    return replace(arm(name, **moe), num_seeds=NUM_SEEDS)


ROOM = {
    "0.5": TIGHT,
    "0.75": POSITION,
    "1": limited("capacity 1", capacity=capped(1.0, "position")),
    "1.25": limited("capacity 1.25", capacity=capped(1.25, "position")),
    "2": limited("capacity 2", capacity=capped(2.0, "position")),
}
ROOM_AT = {name: float(name) for name in ROOM}
ROOM_ALIKE = {name: (BALANCED, SAME_A)[place % 2] for place, name in enumerate(ROOM)}
RANDOM = limited("capacity 0.75, random", capacity=capped(0.75, "random"))
NEXT = limited("capacity 1, next choice", capacity=Capacity(1.0, overflow="next_choice"))
SPILLED = limited("capacity 0.75, shared expert", capacity=Capacity(0.75, overflow="shared"), shared_experts=1)
SMALL = of(ROOM["1"], "capacity 1, 2 sequences a forward", micro_batch_size=2)
SMALL_FREE = of(limited(""), "no limit, 2 sequences a forward", micro_batch_size=2)


def at(factor: float, policy: str = "position", tokens: int = WHOLE, run: Arm = LIMITED) -> Arm:
    """A point of the grid."""
    return run.at(part_of_grid(tokens, policy, factor))


def _only(factor: str, run: Arm) -> tuple[Arm | None, ...]:
    return tuple(run if name == factor else None for name in ROOM)


def less(metric: str, treated: str, baseline: str, unit: str = "") -> Contrast:
    """The treated point's number is below the baseline's: same weights, same text."""
    name = f"{metric.replace('_', ' ')}, {treated} minus {baseline}"
    return Contrast(name, ((1.0, treated, metric), (-1.0, baseline, metric)), below(0.0), unit)


# ---------------------------------------------------------------------------------------------------- without training


def next_choice_drops(bench: Bench, setup: tuple[Capacity, Sequence[Load]]) -> list[Reading]:
    """Share of the assignments that find no room, for fair routers whose tokens rank all experts."""
    capacity, loads = setup
    readings = []
    for load in loads:
        router = TopK(k=K).build(EXPERTS, EXPERTS)
        values = []
        for seed in range(EACH * bench.trials // 5):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                router.weight.copy_(torch.eye(EXPERTS))  # logits are the inputs
                decision = router(torch.randn(load.num_tokens, EXPERTS, generator=generator))
            fitted = fit(decision, replace(capacity, factor=load.factor), training=True)
            values.append(float(fitted.drops["capacity"]) / (load.num_tokens * K))
        readings.append(Reading(f"share dropped, {load.num_tokens} tokens", "", tuple(values), below(0.001)))
    return readings


UNTRAINED = (
    Claim(
        name="r8-next-choice-loses-nothing",
        theme=THEME,
        hypothesis="With the next choice that has room nothing is dropped at a factor of 1.1",
        where="arithmetic of this package, docs/routing.md: there is room for all, and each token ranks all experts",
        theirs="no figure",
        method="fair routers, 8 experts, top-2, 64 to 1024 tokens in a forward",
        control_is="the same without a next choice",
        measure=next_choice_drops,
        setup=(Capacity(overflow="next_choice"), tuple(Load(1.1, tokens) for tokens in FORWARDS[1:])),
        control=(Capacity(), tuple(Load(1.1, tokens) for tokens in FORWARDS[1:])),
        seconds=0.9,
    ),
)

# ------------------------------------------------------------------------------------- one trained model, many limits

ON_ONE_MODEL = f"{NUM_SEEDS} seeds; a model trained without limits, {TOKENS} tokens of validation text"
FAIR = expected_drop_rate(1.0, WHOLE, K, EXPERTS)

SERVED = (
    training_claim(
        (
            Contrast(
                f"drop share at factor 1, {WHOLE} tokens a forward",
                ((1.0, "run", "drop_share"),),
                Range(0.8 * FAIR, 1.25 * FAIR),
            ),
        ),
        {"run": at(1.0)},
        {"run": at(0.5)},
        name="r8-trained-routers-drop-like-fair-ones",
        theme=THEME,
        hypothesis="A trained, balanced router drops what chance alone makes a fair one drop",
        where="arithmetic of this package, docs/routing.md; the limits that people set come from it",
        theirs=f"{FAIR:.1%} at factor 1",
        method=f"{ON_ONE_MODEL}; within a fifth of what the binomial gives",
        control_is="half of the factor",
    ),
    training_claim(
        (less("drop_share", "1024 tokens", "16 tokens"), less("cost", "1024 tokens", "16 tokens", "nats")),
        {"1024 tokens": at(1.0), "16 tokens": at(1.0, tokens=16)},
        {"1024 tokens": at(1.0), "16 tokens": at(1.0)},
        name="r8-small-forwards-drop-more",
        theme=THEME,
        hypothesis="The fewer tokens share a capacity, the more is dropped, and the more it costs",
        where=f"{PRODUCTION}: any variance caused dropping at factor 1; arXiv 2101.03961",
        theirs="0.4 / sqrt(assignments per expert) for a fair router",
        method=f"{ON_ONE_MODEL}; factor 1, forwards of 16 tokens against 1024; cost is beyond no limit",
        control_is="1024 tokens in both",
    ),
    training_claim(
        (less("cost", "probability", "random", "nats"), less("cost", "probability", "position", "nats")),
        {name: at(0.75, name) for name in ("probability", "random", "position")},
        {"probability": at(0.75), "random": at(0.75), "position": at(0.75)},
        name="r8-dropping-the-least-probable-costs-least",
        theme=THEME,
        hypothesis="Of what must be dropped, the least probable assignments cost least",
        where="Megatron-LM and DeepSpeed's default; arXiv 2106.05974 for images",
        theirs="no figure",
        method=f"{ON_ONE_MODEL}; factor 0.75",
        control_is="by position in all places",
    ),
    training_claim(
        (less("cost", "random", "position", "nats"),),
        {"random": at(0.75, "random"), "position": at(0.75)},
        {"random": at(0.75), "position": at(0.75)},
        name="r8-random-drops-cost-less-than-late-ones",
        theme=THEME,
        hypothesis="Dropping at random costs less than dropping whoever comes last",
        where="DeepSpeed's random token selection: position is biased against late tokens",
        theirs="no figure",
        method=f"{ON_ONE_MODEL}; factor 0.75; by position the last sequences of a forward lose the most",
        control_is="by position in both",
    ),
    training_claim(
        (less("cost", "next_choice", "position", "nats"),),
        {"next_choice": at(1.0, "next_choice"), "position": at(1.0)},
        {"next_choice": at(1.0), "position": at(1.0)},
        name="r8-the-next-choice-is-better-than-none",
        theme=THEME,
        hypothesis="A token without room is better off with its next choice than with nothing",
        where="arXiv 2006.16668 and MiniMax-01 pass tokens on; our repair, docs/repair.md",
        theirs="no figure",
        method=f"{ON_ONE_MODEL}; factor 1",
        control_is="dropped in both",
    ),
    training_claim(
        (less("cost", "shared", "position", "nats"),),
        {"shared": at(0.75, "shared", run=LIMITED_SHARED), "position": at(0.75, run=LIMITED_SHARED)},
        {"shared": at(0.75, run=LIMITED_SHARED), "position": at(0.75, run=LIMITED_SHARED)},
        name="r8-a-shared-expert-stands-in",
        theme=THEME,
        hypothesis="A shared expert that takes over the weight of what has no room costs less than dropping it",
        where=f"{PRODUCTION}: the shared expert is a safety net",
        theirs="no figure",
        method=f"{ON_ONE_MODEL}, with a shared expert; factor 0.75",
        control_is="dropped in both",
    ),
)

# --------------------------------------------------------------------------------------------------- trained under them

TRAINED = (
    training_claim(
        (slope("loss", "loss per unit of the capacity factor, nats", "less", ROOM_AT),),
        ROOM,
        ROOM_ALIKE,
        name="r8-less-room-costs-more-loss",
        theme=THEME,
        hypothesis="The smaller the capacity factor in training, the worse the model",
        where=f"{PRODUCTION}: dropped tokens are a silent accuracy killer",
        theirs="no figure",
        method=f"{NUM_SEEDS} seeds; factors 0.5, 0.75, 1, 1.25, 2 by position, least squares; validation has no limit",
        control_is="balanced runs without limits in all five places",
    ),
    training_claim(
        (as_good(),),
        {"treated": ROOM["1.25"], "baseline": BALANCED},
        {"treated": HALF_TRAINED, "baseline": BALANCED},
        name="r8-factor-1.25-costs-nothing",
        theme=THEME,
        hypothesis="Training with a capacity factor of 1.25 costs no quality",
        where="arXiv 2101.03961: 1.0 to 1.25 in training",
        theirs="as good",
        method=f"{NUM_SEEDS} seeds; factor 1.25 by position against no limit; validation has none",
        control_is=WORSE,
    ),
    training_claim(
        (as_good(),),
        {"treated": RANDOM, "baseline": POSITION},
        {"treated": HALF_TRAINED, "baseline": BALANCED},
        name="r8-random-drops-train-as-well",
        theme=THEME,
        hypothesis="Training with random drops is no worse than with drops by position",
        where="DeepSpeed's random token selection",
        theirs="better convergence",
        method=f"{NUM_SEEDS} seeds; factor 0.75; the least probable ones are `r8-dropping-the-least-probable`",
        control_is=WORSE,
    ),
    training_claim(
        (as_good(),),
        {"treated": NEXT, "baseline": BALANCED},
        {"treated": HALF_TRAINED, "baseline": BALANCED},
        name="r8-next-choice-trains-as-well",
        theme=THEME,
        hypothesis="Training at factor 1 with the next choice that has room is as good as without limits",
        where="our own option, docs/routing.md",
        theirs="no figure",
        method=f"{NUM_SEEDS} seeds; validation has no limit",
        control_is=WORSE,
    ),
    training_claim(
        (as_good(),),
        {"treated": SPILLED, "baseline": SHARED},
        {"treated": HALF_TRAINED, "baseline": BALANCED},
        name="r8-spilling-to-a-shared-expert-trains-as-well",
        theme=THEME,
        hypothesis="Training at factor 0.75 with a shared expert for the rest is as good as without limits",
        where=f"{PRODUCTION}: the shared expert is a safety net",
        theirs="no figure",
        method=f"{NUM_SEEDS} seeds; a shared expert in both; validation has no limit",
        control_is=WORSE,
    ),
    training_claim(
        (
            difference("drop_share", "share dropped, 128 tokens a forward minus 1024", "more"),
            Contrast(
                f"loss that factor 1 costs, 128 tokens minus 1024 (margin {LOSS_MARGIN:g})",
                ((1.0, "treated", "loss"), (-1.0, "free", "loss"), (-1.0, "baseline", "loss"), (1.0, "whole", "loss")),
                above(LOSS_MARGIN),
                "nats",
            ),
        ),
        {"treated": SMALL, "free": SMALL_FREE, "baseline": ROOM["1"], "whole": BALANCED},
        {"treated": SAME_A, "free": BALANCED, "baseline": SAME_A, "whole": BALANCED},
        name="r8-small-micro-batches-cost-quality",
        theme=THEME,
        hypothesis="With small micro-batches each has its own capacity: more is dropped, and the model is worse for it",
        where=f"{PRODUCTION}: dropped tokens are a silent accuracy killer",
        theirs="no figure",
        method=f"{NUM_SEEDS} seeds; factor 1, micro-batches of 2 sequences against the whole batch of 16, each beside "
        "the same without a limit",
        control_is=NOTHING_DIFFERS,
    ),
)

CLAIMS = (*UNTRAINED, *SERVED, *TRAINED)

FACTOR_TICKS = tuple(f"{factor:g}" for factor in FACTORS)
CURVES = (
    Curve(
        name="r8-policies",
        theme=THEME,
        title="One trained model under capacities, by who is kept",
        axis="capacity factor",
        places=FACTORS,
        ticks=FACTOR_TICKS,
        panels=(
            Panel("drop_share", f"share dropped, {WHOLE} tokens a forward"),
            Panel("cost", "loss beyond no limit [nats]"),
        ),
        lines=(
            *(Line(policy, tuple(at(factor, policy) for factor in FACTORS)) for policy in POLICIES if policy != SPARE),
            *(
                Line(f"{label}, model with a shared expert", tuple(at(f, policy, run=LIMITED_SHARED) for f in FACTORS))
                for policy, label in (("position", "position"), (SPARE, "shared takes over"))
            ),
            Line(
                "fair router, computed",
                computed=tuple(expected_drop_rate(factor, WHOLE, K, EXPERTS) for factor in FACTORS),
            ),
        ),
    ),
    Curve(
        name="r8-forwards",
        theme=THEME,
        title="One trained model under capacities, by the tokens that share one",
        axis="capacity factor",
        places=FACTORS,
        ticks=FACTOR_TICKS,
        panels=(Panel("drop_share", "share dropped, by position"), Panel("cost", "loss beyond no limit [nats]")),
        lines=tuple(
            Line(f"{tokens} tokens a forward", tuple(at(factor, tokens=tokens) for factor in FACTORS))
            for tokens in FORWARDS
        ),
        note="a forward of 16 tokens is one sequence of 16, the others are sequences of 64; cost is beyond no limit "
        "at the same length",
    ),
    Curve(
        name="r8-training",
        theme=THEME,
        title="Trained under a capacity, validated without",
        axis="capacity factor in training",
        places=tuple(ROOM_AT.values()),
        ticks=tuple(ROOM),
        panels=(
            Panel("loss", "validation loss beyond no limit [nats]", beside=BALANCED),
            Panel("drop_share", "share dropped at the end of training"),
        ),
        lines=(
            Line("position", tuple(ROOM.values())),
            Line("least probable dropped", _only("0.75", PROBABILITY)),
            Line("random", _only("0.75", RANDOM)),
            Line("next choice", _only("1", NEXT)),
            Line("position, 128 tokens a forward", _only("1", SMALL)),
            Line("no limit", (BALANCED,) * len(ROOM)),
        ),
    ),
)
