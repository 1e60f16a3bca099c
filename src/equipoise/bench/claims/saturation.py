"""Claims about the way out of a saturated router: trained, broken, and trained on under one remedy or another."""

from __future__ import annotations

from dataclasses import replace

from equipoise.bench.claims.arms import BALANCED
from equipoise.bench.claims.balance import PRODUCTION
from equipoise.bench.claims.claim import Arm, Bench, Claim, Reading
from equipoise.bench.claims.contrast import Contrast, training_claim
from equipoise.bench.claims.curves import Curve, Line, Panel
from equipoise.bench.claims.healing_probe import BLOW, EVEN, FAULTS, LR, REMEDIES, STEPS
from equipoise.bench.claims.routers import THEME, Recovery, steps_to_even
from equipoise.bench.claims.statistics import Range, above, below

NUM_SEEDS = 3
HEALED = replace(
    BALANCED, label="balanced, then broken and healed", probe="healing", num_seeds=NUM_SEEDS, seconds=270.0
)
QUICK, SLOW = 5.0, 100.0  # steps
SAME_REMEDY = "the same remedy in both places"
TRIED = f"{NUM_SEEDS} seeds; every layer of a trained model broken, trained on at a rate of {LR:g} for {STEPS} steps"


def after(fault: str, remedy: str) -> Arm:
    """What came of it."""
    return HEALED.at(f"{fault}.{remedy}")


def steps(claimed: Range, role: str = "run", name: str = "") -> Contrast:
    """Steps to an even load."""
    label = f"steps until MaxVio stays below {EVEN:g}, at most {STEPS}"
    return Contrast(f"{name}: {label}" if name else label, ((1.0, role, "steps"),), claimed)


def fewer(claimed: Range) -> Contrast:
    """Steps of the treated, less those of the baseline."""
    return Contrast("steps until even, difference", ((1.0, "treated", "steps"), (-1.0, "baseline", "steps")), claimed)


def in_places(treated: str, baseline: str, fault: str = "spike") -> dict[str, Arm]:
    """Two remedies of one fault."""
    return {"treated": after(fault, treated), "baseline": after(fault, baseline)}


def gap_over_rate(bench: Bench, setup: Recovery) -> list[Reading]:
    """Steps to an even load over what the bias has to make up for, at twice its rate a step."""
    expected = setup.blow / (2 * setup.rate)
    values = tuple(steps_to_even(setup, seed) / expected for seed in range(max(5, bench.trials // 4)))
    return [Reading("steps over gap / (2 rate)", "", values, Range(0.8, 1.2))]


SIMULATED = (
    Claim(
        name="r4-sign-takes-gap-over-twice-the-rate",
        theme=THEME,
        hypothesis="A bias that moves by its rate each step needs the logits' gap over twice the rate",
        where="arithmetic of this package: the full expert's bias falls while the others' rise; arXiv 2408.15664",
        theirs="gap / (2 rate)",
        method="+20 logits on one expert of 8, rate 0.05: 200 steps, counted with fresh tokens each step",
        control_is="quantile balancing, which has no rate",
        measure=gap_over_rate,
        setup=Recovery("sign"),
        control=Recovery("quantile"),
        seconds=0.2,
    ),
)

TRAINED = (
    training_claim(
        tuple(steps(below(QUICK), fault, fault) for fault in FAULTS),
        {fault: after(fault, "quantile") for fault in FAULTS},
        {fault: after(fault, "nothing") for fault in FAULTS},
        name="r4-in-training-quantile-recovers-at-once",
        theme=THEME,
        hypothesis="Quantile balancing evens a broken router of a model in training within 5 steps, whatever broke it",
        where="kexue.fm/11619: the bias that would have balanced the last batch, without a rate",
        theirs="a few steps",
        method=f"{TRIED}: +20 logits on one expert, a row of ten times its length, a bias that ran away by 20",
        control_is="nothing that balances",
    ),
    training_claim(
        (steps(below(SLOW)),),
        {"run": after("spike", "switch_0.01")},
        {"run": after("spike", "nothing")},
        {"run": after("spike", "quantile")},
        present_is="quantile balancing in the loss's place",
        name="r4-in-training-the-loss-recovers",
        theme=THEME,
        hypothesis="The balancing loss recovers a saturated router of a model in training within 100 steps",
        where=f"{PRODUCTION}: fix it by a higher balancing loss",
        theirs="0.01 in place of 0.001",
        method=f"{TRIED}: +20 logits on one expert, Switch loss 0.01",
        control_is="nothing that balances",
    ),
    training_claim(
        (fewer(below(0.0)),),
        in_places("switch_0.1", "switch_0.01"),
        in_places("switch_0.01", "switch_0.01"),
        name="r4-a-larger-loss-recovers-sooner",
        theme=THEME,
        hypothesis="Ten times the coefficient brings a saturated router back sooner",
        where=f"{PRODUCTION}: raise the balancing loss",
        theirs="no figure",
        method=f"{TRIED}: +20 logits on one expert, Switch loss 0.1 against 0.01",
        control_is=SAME_REMEDY,
    ),
    training_claim(
        (fewer(below(0.0)),),
        in_places("switch_and_z", "switch_0.01"),
        in_places("switch_0.01", "switch_0.01"),
        name="r4-z-loss-frees-a-saturated-router",
        theme=THEME,
        hypothesis="A z-loss makes the logits small, and so lets the balancing loss act on a saturated router",
        where="arXiv 2202.08906: the router z-loss keeps logits small",
        theirs="no figure",
        method=f"{TRIED}: +20 logits on one expert, Switch loss 0.01 with a z-loss of 0.01 against without",
        control_is=SAME_REMEDY,
    ),
    training_claim(
        (steps(Range(0.7 * BLOW / 0.2, 1.3 * BLOW / 0.2)),),
        {"run": after("spike", "sign_0.1")},
        {"run": after("spike", "sign_0.01")},
        name="r4-in-training-sign-takes-gap-over-twice-the-rate",
        theme=THEME,
        hypothesis="In training too a sign bias needs the gap over twice its rate",
        where="arithmetic, see `r4-sign-takes-gap-over-twice-the-rate`",
        theirs="20 / (2 x 0.1) = 100 steps",
        method=f"{TRIED}: +20 logits on one expert, bias moved by 0.1 a step; counted within 30 %",
        control_is="a tenth of the rate",
    ),
    training_claim(
        (fewer(below(25.0)),),
        in_places("smooth_0.1", "sign_0.1", "runaway"),
        in_places("nothing", "sign_0.1", "runaway"),
        name="r4-smooth-steps-recover-like-sign-steps",
        theme=THEME,
        hypothesis="A bias that moves smoothly recovers as soon as one that moves by sign",
        where="arXiv 2602.17004 (SMEBU): tanh of the violation in place of its sign",
        theirs="no figure",
        method=f"{TRIED}: a bias that ran away by 20, rate 0.1 both; at most 25 steps later",
        control_is="nothing that balances in its place",
    ),
    training_claim(
        (
            Contrast(
                "training loss beyond the whole model's, fresh router minus quantile",
                ((1.0, "treated", "cost"), (-1.0, "baseline", "cost")),
                above(0.0),
                "nats",
            ),
        ),
        in_places("fresh_router", "quantile"),
        in_places("quantile", "quantile"),
        name="r4-a-fresh-router-costs-more-than-a-bias",
        theme=THEME,
        hypothesis="A router drawn anew costs more loss than a bias on the broken one",
        where="our own order of repairs, docs/repair.md: the gentlest first",
        theirs="no figure",
        method=f"{TRIED}: +20 logits on one expert; mean over the steps, the same batches",
        control_is=SAME_REMEDY,
    ),
)

CLAIMS = (*SIMULATED, *TRAINED)

CURVES = (
    Curve(
        name="r4-remedies",
        theme=THEME,
        title="A trained router, broken in three ways, under nine remedies",
        axis="remedy",
        places=tuple(float(place) for place in range(len(REMEDIES))),
        ticks=tuple(REMEDIES),
        panels=(
            Panel("steps", f"steps until MaxVio stays below {EVEN:g}, at most {STEPS}"),
            Panel("cost", "training loss beyond the whole model's, mean [nats]"),
            Panel("late_cost", "the same, last 20 steps [nats]"),
        ),
        lines=tuple(Line(fault, tuple(after(fault, remedy) for remedy in REMEDIES)) for fault in FAULTS),
        joined=False,
        note="spike: +20 logits on one expert of each layer; stretch: its row of the router's weight ten times as "
        "long; runaway: +20 on its selection bias, which no loss can move",
    ),
)
