"""Claims about balancing: what happens without it, how strong it may be, and what else balances."""

from __future__ import annotations

from equipoise.bench.claims.arms import BALANCED, SAME_A, STEPS, UNBALANCED, arm, of, switch
from equipoise.bench.claims.contrast import Contrast, as_good, difference, training_claim
from equipoise.bench.claims.statistics import above
from equipoise.routing import BiasBalance, HighThenLow, QuantileBalance, SwitchLoss, TopK, ZLoss

THEME = "balance"
PRODUCTION = "published article on MoE in production, 2026-05"
EXPLAINER = "published explainer of routing collapse, 2026"
POST = "blog post on routing collapse and JAX, 2026"
NOTHING_DIFFERS = "both arms balanced, the coefficient 0.1 % apart"
ABSENT = {"treated": SAME_A, "baseline": BALANCED}

WEAK = arm("Switch loss 0.001", balance=switch(0.001))
STRONG = arm("Switch loss 0.1", balance=switch(0.1))
OVERDONE = arm("Switch loss 1", balance=switch(1.0))
BIAS = arm("balancing bias, 0.01 a step", balance=(BiasBalance(rate=0.01),))
QUANTILE = arm("quantile balancing", balance=(QuantileBalance(),))
Z_ALONE = arm("z-loss 0.01 alone", balance=(ZLoss(coef=0.01),))
EARLY = arm(
    "Switch loss 0.1, then 0.001",
    balance=(SwitchLoss(coef=HighThenLow(0.1, 0.001, hold=STEPS // 4, anneal=STEPS // 4)),),
)
TOP1 = TopK(k=1)
ONE = arm("top-1, balanced", router=TOP1)
ONE_UNBALANCED = arm("top-1, no balancing", router=TOP1, balance=switch(0.0))
MANY_UNBALANCED = arm("32 experts, no balancing", num_experts=32, balance=switch(0.0))
WIDE_INIT = arm("no balancing, router init 0.1", router=TopK(k=2, init_std=0.1), balance=switch(0.0))
NARROW_INIT = arm("no balancing, router init 0.01", router=TopK(k=2, init_std=0.01), balance=switch(0.0))
LOCAL = of(arm("load of 2 sequences", balance=switch(0.1)), "load of 2 sequences", micro_batch_size=2)
GLOBAL = of(arm("", balance=switch(0.1, scope="global")), "load of the whole batch", micro_batch_size=2)
WHOLE = arm("one micro-batch, global scope", balance=switch(0.1, scope="global"))

MAXVIO = "MaxVio, mean over layers and the last 50 steps, difference"


def imbalance(claimed: str) -> Contrast:
    """More or less of it in the treated run."""
    return difference("max_violation", MAXVIO, "more" if claimed == "more" else "less")


COLLAPSE = (
    training_claim(
        (imbalance("more"),),
        {"treated": UNBALANCED, "baseline": BALANCED},
        ABSENT,
        name="r1-collapse-without-balancing",
        theme=THEME,
        hypothesis="Without a balancing loss the router collapses onto few experts",
        where=f"{PRODUCTION}: without the loss the router always picks the same two",
        theirs="all tokens to 2 of 8",
        method="no balancing against the Switch loss at 0.01, 8 experts, top-2",
        control_is=NOTHING_DIFFERS,
    ),
    training_claim(
        (
            Contrast(
                "MaxVio that balancing saves, top-1 minus top-2",
                (
                    (1.0, "one off", "max_violation"),
                    (-1.0, "one on", "max_violation"),
                    (-1.0, "two off", "max_violation"),
                    (1.0, "two on", "max_violation"),
                ),
                "more",
            ),
        ),
        {"one off": ONE_UNBALANCED, "one on": ONE, "two off": UNBALANCED, "two on": BALANCED},
        {"one off": SAME_A, "one on": BALANCED, "two off": SAME_A, "two on": BALANCED},
        name="top-1-collapses-worse",
        theme=THEME,
        hypothesis="Top-1 routing is more prone to collapse than top-2",
        where=f"{PRODUCTION}: found top-1 more prone to router collapse",
        theirs="no figure",
        method="what taking the balancing away adds to MaxVio at top-1, less what it adds at top-2",
        control_is="balanced runs in all four places",
    ),
    training_claim(
        (imbalance("less"),),
        {"treated": MANY_UNBALANCED, "baseline": UNBALANCED},
        ABSENT,
        name="more-experts-dilute-collapse",
        theme=THEME,
        hypothesis="More experts dilute collapse by themselves",
        where=f"{EXPLAINER}: larger expert counts naturally dilute it",
        theirs="no figure",
        method="32 experts against 8, both without balancing, top-2",
        control_is=NOTHING_DIFFERS,
    ),
    training_claim(
        (difference("early_violation", "MaxVio over the first quarter, difference", "less"),),
        {"treated": WIDE_INIT, "baseline": NARROW_INIT},
        ABSENT,
        name="wide-router-init-prevents-collapse",
        theme=THEME,
        hypothesis="A router initialised at 0.1 instead of 0.01 does not collapse early",
        where=f"{PRODUCTION}: cured an early collapse by a larger variance",
        theirs="0.1 good, 0.01 collapsed in 100 steps",
        method="router weights drawn with 0.1 against 0.01, no balancing",
        control_is=NOTHING_DIFFERS,
    ),
    training_claim(
        (
            Contrast(
                "MaxVio, first layer minus the middle ones",
                ((1.0, "run", "first_violation"), (-1.0, "run", "middle_violation")),
                "more",
                noise="max_violation",
            ),
        ),
        {"run": UNBALANCED},
        {"run": QUANTILE},
        name="r7-first-layer-is-worst",
        theme=THEME,
        hypothesis="Early and late layers collapse, middle ones stay even",
        where=f"{EXPLAINER}: collapse concentrates at the network's boundaries",
        theirs="most tokens to one or two experts there",
        method="layer 0 against layers 1 and 2 of 4, no balancing; the last layer is in the table of runs",
        control_is="quantile balancing, which evens every layer",
    ),
)

STRENGTH = (
    training_claim(
        (difference("loss", "loss, coefficient 1 minus 0.01", "more", "nats"),),
        {"treated": OVERDONE, "baseline": BALANCED},
        ABSENT,
        name="r2-too-much-balancing-costs-loss",
        theme=THEME,
        hypothesis="Too large a balancing coefficient interferes with the language model",
        where=f"{EXPLAINER}: too large, and it interferes with the objective",
        theirs="0.01 recommended of 1e-5 to 0.1",
        method="Switch loss at 1 against 0.01",
        control_is=NOTHING_DIFFERS,
    ),
    training_claim(
        (difference("specialisation", "domain and expert, mutual information, difference", "less", "nats"),),
        {"treated": OVERDONE, "baseline": BALANCED},
        ABSENT,
        name="too-much-balancing-costs-specialisation",
        theme=THEME,
        hypothesis="Too large a coefficient makes the router uniform, and specialisation is lost",
        where=f"{PRODUCTION}: set it too high and the router becomes too uniform",
        theirs="0.001 to 0.01 advised",
        method="Switch loss at 1 against 0.01; beyond what documents with swapped domains give",
        control_is=NOTHING_DIFFERS,
    ),
    training_claim(
        (
            Contrast(
                "balancing over task gradient, 0.1 minus 3 times that at 0.01",
                ((1.0, "treated", "ratio"), (-3.0, "baseline", "ratio")),
                above(0.0),
            ),
        ),
        {"treated": STRONG, "baseline": BALANCED},
        ABSENT,
        name="r9-interference-grows-with-the-coefficient",
        theme=THEME,
        hypothesis="The balancing gradient on the router grows in proportion to the coefficient",
        where=f"{POST}: the auxiliary loss makes interference gradients",
        theirs="no figure",
        method="ratio of the gradients' lengths at 0.1 against 0.01: more than 3 times as much for 10 times the loss",
        control_is=NOTHING_DIFFERS,
    ),
    training_claim(
        (difference("specialisation", "domain and expert, mutual information, difference", "more", "nats"),),
        {"treated": GLOBAL, "baseline": LOCAL},
        {"treated": WHOLE, "baseline": STRONG},
        name="r5-global-load-specialises-more",
        theme=THEME,
        hypothesis="Balancing over the whole batch leaves more specialisation than over micro-batches",
        where="arXiv 2501.11873: the load of a micro-batch of one domain hinders specialists",
        theirs="higher specialisation at equal or lower loss",
        method="coefficient 0.1, 8 micro-batches of 2 sequences: load of all of them against each one's",
        control_is="one micro-batch, where the two are the same loss",
    ),
    training_claim(
        (difference("early_violation", "MaxVio over the first quarter, difference", "less"), as_good()),
        {"treated": EARLY, "baseline": WEAK},
        {"treated": WEAK, "baseline": WEAK},
        name="high-coefficient-first",
        theme=THEME,
        hypothesis="A high coefficient first, a low one later, prevents early collapse at no cost in loss",
        where=f"{PRODUCTION}: 0.1 for the first 1000 steps, then down to 0.001",
        theirs="no collapse",
        method="0.1 for a quarter of the run, then down to 0.001, against 0.001 all along",
        control_is="0.001 in both arms",
    ),
)

OTHERS = (
    training_claim(
        (imbalance("less"), as_good()),
        {"treated": BIAS, "baseline": BALANCED},
        {"treated": UNBALANCED, "baseline": BALANCED},
        name="r3-bias-balances-better",
        theme=THEME,
        hypothesis="A balancing bias balances better than the loss does, at no cost in loss",
        where=f"{EXPLAINER}: a bias cannot interfere; arXiv 2408.15664 has MaxVio 0.04 against 0.72",
        theirs="MaxVio 0.04 against 0.72",
        method="bias moved by 0.01 a step against the Switch loss at 0.01",
        control_is="no balancing in the bias's place",
    ),
    training_claim(
        (imbalance("less"), as_good()),
        {"treated": QUANTILE, "baseline": BALANCED},
        {"treated": UNBALANCED, "baseline": BALANCED},
        name="r3-quantile-balances-better",
        theme=THEME,
        hypothesis="Quantile balancing balances better than the loss does, at no cost in loss",
        where="kexue.fm/11619: the bias that would have balanced the last batch, without a rate",
        theirs="balanced within a few steps",
        method="quantile balancing against the Switch loss at 0.01",
        control_is="no balancing in the bias's place",
    ),
    training_claim(
        (imbalance("less"),),
        {"treated": Z_ALONE, "baseline": UNBALANCED},
        ABSENT,
        name="z-loss-balances",
        theme=THEME,
        hypothesis="The router z-loss balances, and needs no counts",
        where=f"{PRODUCTION}: offered as an alternative to the balancing loss, coefficient 0.01",
        theirs="preferred for stability",
        method="z-loss 0.01 alone against no balancing at all",
        control_is=NOTHING_DIFFERS,
    ),
)

CLAIMS = (*COLLAPSE, *STRENGTH, *OTHERS)
