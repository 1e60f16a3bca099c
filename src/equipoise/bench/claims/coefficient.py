"""Claims about the balancing coefficient from 0 to 1: balance, loss, specialisation, and how the gradients lie."""

from __future__ import annotations

from equipoise.bench.claims.arms import BALANCED, HALF_TRAINED, SAME_A, UNBALANCED, arm, switch
from equipoise.bench.claims.balance import EXPLAINER, NOTHING_DIFFERS, OVERDONE, POST, PRODUCTION, STRONG, THEME, WEAK
from equipoise.bench.claims.contrast import LOSS_MARGIN, Contrast, difference, slope, training_claim
from equipoise.bench.claims.curves import Curve, Line, Panel
from equipoise.bench.claims.statistics import Range

FAINT = arm("Switch loss 0.0001", balance=switch(0.0001))
SWEEP = {"0": UNBALANCED, "0.0001": FAINT, "0.001": WEAK, "0.01": BALANCED, "0.1": STRONG, "1": OVERDONE}
DECADES = {"0.0001": -4.0, "0.001": -3.0, "0.01": -2.0, "0.1": -1.0, "1": 0.0}
ALIKE = {coef: (BALANCED, SAME_A)[place % 2] for place, coef in enumerate(SWEEP)}
ALL_ALIKE = "balanced runs in all six places, their coefficients 0.1 % apart"
SLOPED = "Switch loss from 0.0001 to 1, least squares over five decades"

NEIGHBOURS = tuple(zip(SWEEP, list(SWEEP)[1:], strict=False))

CLAIMS = (
    training_claim(
        (
            *(
                Contrast(
                    f"MaxVio, {high} minus {low}",
                    ((1.0, high, "max_violation"), (-1.0, low, "max_violation")),
                    "no more",
                )
                for low, high in NEIGHBOURS
            ),
            Contrast("MaxVio, 1 minus 0", ((1.0, "1", "max_violation"), (-1.0, "0", "max_violation")), "less"),
        ),
        SWEEP,
        ALIKE,
        name="r2-more-balancing-is-more-even",
        theme=THEME,
        hypothesis="The larger the balancing coefficient, the more even the load, over all of its range",
        where=f"{PRODUCTION}: raise it when experts starve",
        theirs="0.001 to 0.01 advised, 0.1 tried",
        method="Switch loss 0, 0.0001, 0.001, 0.01, 0.1, 1: no step up leaves the load less even, the last is the best",
        control_is=ALL_ALIKE,
    ),
    training_claim(
        (difference("loss", "loss, no balancing minus coefficient 0.01", "more", "nats"),),
        {"treated": UNBALANCED, "baseline": BALANCED},
        {"treated": SAME_A, "baseline": BALANCED},
        {"treated": HALF_TRAINED, "baseline": BALANCED},
        present_is="a run of half the steps: its loss is worse for sure",
        name="r2-too-little-balancing-costs-loss",
        theme=THEME,
        hypothesis="Without balancing the loss is worse: the left side of the valley",
        where="arXiv 1701.06538, table 6: perplexity 39.8 without balancing losses, 35.6 with",
        theirs="0.11 nats, at 4 of 256 experts per token",
        method="no balancing against the Switch loss at 0.01; the right side is `r2-too-much-balancing-costs-loss`",
        control_is=NOTHING_DIFFERS,
    ),
    training_claim(
        tuple(
            Contrast(
                f"loss, coefficient {coef} minus 0.01 (margin {LOSS_MARGIN:g})",
                ((1.0, coef, "loss"), (-1.0, "0.01", "loss")),
                Range(-LOSS_MARGIN, LOSS_MARGIN),
                "nats",
            )
            for coef in ("0.001", "0.1")
        ),
        {coef: SWEEP[coef] for coef in ("0.001", "0.01", "0.1")},
        {"0.001": HALF_TRAINED, "0.01": BALANCED, "0.1": HALF_TRAINED},
        name="r2-the-valley-is-flat",
        theme=THEME,
        hypothesis="Over two decades of the coefficient the loss is the same",
        where="arXiv 1701.06538, table 6: weights 0.01 to 1, perplexity 35.6 to 35.7",
        theirs="0.003 nats apart",
        method="Switch loss 0.001 and 0.1 against 0.01, neither better nor worse by the margin",
        control_is="runs of half the steps in the places of 0.001 and 0.1",
    ),
    training_claim(
        (slope("specialisation", "domain and expert, mutual information, nats per decade", "less", DECADES),),
        {coef: SWEEP[coef] for coef in DECADES},
        {coef: ALIKE[coef] for coef in DECADES},
        name="r2-specialisation-falls-with-the-coefficient",
        theme=THEME,
        hypothesis="Each decade of the balancing coefficient costs specialisation",
        where=f"{PRODUCTION}: set it too high and the router becomes too uniform",
        theirs="no figure",
        method=f"{SLOPED}; beyond what documents with swapped domains give",
        control_is=ALL_ALIKE,
    ),
    training_claim(
        (slope("cosine", "cosine of balancing and task gradient on the router, per decade", "less", DECADES),),
        {coef: SWEEP[coef] for coef in DECADES},
        {coef: ALIKE[coef] for coef in DECADES},
        name="r2-gradients-oppose-at-large-coefficients",
        theme=THEME,
        hypothesis="The larger the coefficient, the more the balancing gradient points against the task's",
        where=f"{EXPLAINER}: too large, and it interferes with the objective; {POST}: interference gradients",
        theirs="no figure",
        method=f"{SLOPED}; the cosine as measured over the second half of each run",
        control_is=ALL_ALIKE,
    ),
)

CURVES = (
    Curve(
        name="r2-sweep",
        theme=THEME,
        title="The balancing coefficient from 0 to 1",
        axis="coefficient of the Switch loss",
        places=(-5.0, -4.0, -3.0, -2.0, -1.0, 0.0),
        ticks=tuple(SWEEP),
        panels=(
            Panel("loss", "validation loss beyond that at 0.01 [nats]", beside=BALANCED),
            Panel("max_violation", "MaxVio, last 50 steps"),
            Panel("specialisation", "domain and expert, mutual information [nats]"),
            Panel("cosine", "cosine of balancing and task gradient"),
        ),
        lines=(Line("Switch loss", tuple(SWEEP.values())),),
        note="at 0 there is no balancing gradient, and its cosine is called 0",
    ),
)
