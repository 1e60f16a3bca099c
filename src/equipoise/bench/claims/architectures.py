"""Claims about what is trained: dense or sparse, shared and fine-grained experts, other routers, fine-tuning."""

from __future__ import annotations

import math

from equipoise.bench.claims.arms import BALANCED, DENSE, HALF_TRAINED, HIDDEN, SAME_A, VOCAB, arm, switch
from equipoise.bench.claims.balance import ABSENT, EXPLAINER, MAXVIO, NOTHING_DIFFERS, ONE, PRODUCTION
from equipoise.bench.claims.contrast import LOSS_MARGIN, Contrast, as_good, difference, training_claim
from equipoise.bench.claims.statistics import above, below
from equipoise.layer import Capacity
from equipoise.routing import ExpertChoice, Hash, TopK

SHARED = arm("with a shared expert besides", shared_experts=1)
SHARED_UNBALANCED = arm("with a shared expert, no balancing", shared_experts=1, balance=switch(0.0))
FINE = arm("16 experts of half the size, top-4", num_experts=16, hidden_dim=HIDDEN // 2, router=TopK(k=4))
SPARSE = {"num_layers": 4, "moe_layers": (1, 3)}
EVERY_OTHER = arm("experts in every other layer", model=SPARSE)
SHORTCUT = arm("shortcut, one routed and one shared", model=SPARSE, router=TopK(k=1), shared_experts=1, shortcut="pos2")
HASHED = arm("hash, random table", router=Hash(vocab_size=VOCAB, k=2), balance=())
HASH_FIRST = arm("hash in layer 0", first_layers=1, first_router=Hash(vocab_size=VOCAB, k=2))
CHOICE = arm("expert choice", router=ExpertChoice(k=2, allow_future=True), balance=())
TUNED_FROZEN, TUNED = (arm(f"fine-tuned, {name}", probe=f"tuned_{name}") for name in ("frozen", "thawed"))
HEATED = arm("balanced, other temperatures at the end", probe="temperature")
NOT_HEATED = arm("balanced, the same temperature at the end", probe="temperature_same")
FELL_BACK = arm("balanced, then broken", probe="fallbacks")
UNBROKEN = arm("balanced, not broken", probe="fallbacks_unbroken")


def capped(factor: float, policy: str) -> Capacity:
    """Of training."""
    return Capacity(factor, policy=policy)  # type: ignore[arg-type]  # the names are Capacity's


TIGHT = arm("capacity 0.5", capacity=capped(0.5, "position"))
POSITION, PROBABILITY = (
    arm(f"capacity 0.75, {name}", capacity=capped(0.75, name)) for name in ("position", "probability")
)

WORSE = "a run of half the steps in the place of the one that is said to be as good"

SHAPES = (
    training_claim(
        (difference("loss", "loss, MoE minus dense", above(0.0), "nats"),),
        {"treated": BALANCED, "baseline": DENSE},
        {"treated": DENSE, "baseline": DENSE},
        name="dense-is-better-when-small",
        theme="architectures",
        hypothesis="Below a billion parameters a dense model is as good as an MoE or better",
        where=f"{PRODUCTION}: below 1B dense is almost always better",
        theirs="similar perplexity at 350M",
        method="8 experts, top-2, against a dense block of two experts' size: the same arithmetic per token",
        control_is="dense in both arms",
    ),
    training_claim(
        (
            difference(
                "loss",
                "loss, with a shared expert minus without",
                below(math.log(0.92)),
                "nats",
            ),
        ),
        {"treated": SHARED, "baseline": BALANCED},
        ABSENT,
        name="shared-expert-15-percent",
        theme="architectures",
        hypothesis="Adding a shared expert improves perplexity by 15 %",
        where=f"{PRODUCTION}: saw it by adding one",
        theirs="15 % (0.16 nats); counted as seen from half of that",
        method="a shared expert besides top-2: half as much again to compute per token",
        control_is=NOTHING_DIFFERS,
    ),
    training_claim(
        (
            difference("max_violation", MAXVIO, "more"),
            difference("loss", f"loss that collapse costs (margin {LOSS_MARGIN:g})", below(LOSS_MARGIN), "nats"),
        ),
        {"treated": SHARED_UNBALANCED, "baseline": SHARED},
        ABSENT,
        name="r14-shared-expert-hides-collapse",
        theme="architectures",
        hypothesis="With a shared expert the loss does not show a collapsed router",
        where=f"{PRODUCTION}: the shared expert is a safety net against collapse",
        theirs="no figure",
        method="no balancing against 0.01, both with a shared expert: uneven, and the loss within the margin",
        control_is=NOTHING_DIFFERS,
    ),
    training_claim(
        (as_good(),),
        {"treated": FINE, "baseline": BALANCED},
        {"treated": HALF_TRAINED, "baseline": BALANCED},
        name="r14-fine-grained-is-as-good",
        theme="architectures",
        hypothesis="Twice as many experts of half the size, twice as many per token, are as good or better",
        where="arXiv 2401.06066: fine-grained experts",
        theirs="better at equal arithmetic",
        method="16 of half the size, top-4, against 8, top-2",
        control_is=WORSE,
    ),
    training_claim(
        (as_good(),),
        {"treated": SHORTCUT, "baseline": EVERY_OTHER},
        {"treated": HALF_TRAINED, "baseline": BALANCED},
        name="r14-shortcut-is-as-good",
        theme="architectures",
        hypothesis="Reading the layer before, which hides communication, costs no quality",
        where="arXiv 2404.05019 (ScMoE)",
        theirs="equal quality",
        method="experts read the block before, one routed and one shared, against two routed",
        control_is=WORSE,
    ),
    training_claim(
        (difference("loss", "loss, top-2 minus top-1", "less", "nats"),),
        {"treated": BALANCED, "baseline": ONE},
        ABSENT,
        name="top-2-is-better-than-top-1",
        theme="architectures",
        hypothesis="Top-2 is better than top-1, for twice the arithmetic of experts",
        where=f"{PRODUCTION}: top-2 has better balance and quality",
        theirs="no figure",
        method="top-2 against top-1, 8 experts of one size",
        control_is=NOTHING_DIFFERS,
    ),
)

ROUTERS = (
    training_claim(
        (difference("loss", "loss, hash minus learned", "more", "nats"),),
        {"treated": HASHED, "baseline": BALANCED},
        ABSENT,
        name="r6-learned-beats-hash",
        theme="routers",
        hypothesis="Learned routing is better than hashing token ids",
        where=f"{EXPLAINER}: deterministic routing discards quality",
        theirs="see the next",
        method="a random table of token ids against a learned router, top-2",
        control_is=NOTHING_DIFFERS,
    ),
    training_claim(
        (
            Contrast(
                "(dense - learned) - 3 (dense - hash)",
                (
                    (-2.0, "dense", "loss"),
                    (-1.0, "learned", "loss"),
                    (3.0, "hash", "loss"),
                ),
                above(0.0),
                "nats",
            ),
        ),
        {"dense": DENSE, "learned": BALANCED, "hash": HASHED},
        {"dense": DENSE, "learned": BALANCED, "hash": SAME_A},
        name="r6-hash-loses-a-factor-of-3",
        theme="routers",
        hypothesis="Learned routing improves on dense three times as much as hashing does",
        where=f"{EXPLAINER}: hash loses roughly a 3x quality advantage",
        theirs="3 times; of what is not said, taken as the gain over dense",
        method="gain of learned routing over dense, less three times that of hashing",
        control_is="a learned router in the hash's place",
    ),
    training_claim(
        (as_good(),),
        {"treated": HASH_FIRST, "baseline": BALANCED},
        {"treated": HALF_TRAINED, "baseline": BALANCED},
        name="r6-hash-in-the-first-layer",
        theme="routers",
        hypothesis="Hash routing in the first layer costs nothing",
        where="DeepSeek-V4's first layers, arXiv 2106.04426",
        theirs="in use",
        method="hash in layer 0, learned in the others, against learned in all",
        control_is=WORSE,
    ),
    training_claim(
        (difference("loss", "teacher-forced loss, expert choice minus top-2", "less", "nats"),),
        {"treated": CHOICE, "baseline": BALANCED},
        ABSENT,
        name="r13-expert-choice-looks-better",
        theme="routers",
        hypothesis="Expert choice reaches a lower loss in validation",
        where="arXiv 2202.09368: experts take their tokens",
        theirs="twice as fast to the same loss",
        method="batches as in training, in which experts see later tokens; see `r13-expert-choice-leaks`",
        control_is=NOTHING_DIFFERS,
    ),
    training_claim(
        (
            Contrast(
                "loss at 0.3 minus loss at 1, one trained model",
                ((1.0, "run", "loss_low"), (-1.0, "run", "loss_one")),
                below(0.0),
                "nats",
            ),
        ),
        {"run": HEATED},
        {"run": NOT_HEATED},
        name="r10-low-temperature-at-inference",
        theme="routers",
        hypothesis="A router temperature of 0.3 at inference is better than the 1.0 of training",
        where=f"{PRODUCTION}: 0.3 for inference, 1.0 for training",
        theirs="cured a P99",
        method="validation loss of one model at two temperatures of the router",
        control_is="temperature 1 in both",
    ),
    training_claim(
        (
            Contrast(
                "loss, experts in turn minus next choice",
                ((1.0, "run", "loss_round_robin"), (-1.0, "run", "loss_next_choice")),
                below(0.0),
                "nats",
            ),
        ),
        {"run": FELL_BACK},
        {"run": UNBROKEN},
        name="r11-round-robin-is-the-fallback",
        theme="routers",
        hypothesis="Experts in turn are the fallback for a collapsed router",
        where=f"{PRODUCTION}: immediately switch to round-robin",
        theirs="no figure",
        method="all tokens to one expert; loss with experts in turn, less that with the next choice that has room",
        control_is="the same model, not broken: nothing to fall back from",
    ),
    training_claim(
        (
            Contrast(
                "loss, quantile bias minus broken",
                ((1.0, "run", "loss_bias"), (-1.0, "run", "loss_broken")),
                below(-0.02),
                "nats",
            ),
            Contrast("MaxVio under the bias", ((1.0, "run", "violation_bias"),), below(1.0)),
        ),
        {"run": FELL_BACK},
        {"run": UNBROKEN},
        name="r11-a-bias-repairs-collapse",
        theme="routers",
        hypothesis="A bias computed from recent traffic repairs a collapsed router at once",
        where="our own repair, docs/repair.md",
        theirs="no figure",
        method="every router sends all to one expert; loss and MaxVio with and without the bias",
        control_is="the same model, not broken: nothing to repair",
    ),
)

LIMITS = (
    training_claim(
        (difference("loss", "loss, half the fair load minus no limit", "more", "nats"),),
        {"treated": TIGHT, "baseline": BALANCED},
        ABSENT,
        name="r8-drops-cost-loss",
        theme="capacity",
        hypothesis="Dropped tokens cost quality",
        where=f"{PRODUCTION}: a silent accuracy killer; a blog post says beyond 5 %",
        theirs="5 % or 1 % or 0.1 %",
        method="capacity factor 0.5, which drops about half of the assignments, against none",
        control_is=NOTHING_DIFFERS,
    ),
    training_claim(
        (as_good(),),
        {"treated": PROBABILITY, "baseline": POSITION},
        {"treated": HALF_TRAINED, "baseline": BALANCED},
        name="r8-dropping-the-least-probable",
        theme="capacity",
        hypothesis="Dropping by probability is no worse than by position",
        where="Megatron-LM's two policies",
        theirs="no figure",
        method="capacity factor 0.75, who goes first by weight against by place; validation has no limit",
        control_is=WORSE,
    ),
    training_claim(
        (
            Contrast(
                "worst MaxVio while tuning, frozen minus not",
                ((1.0, "treated", "tuned_violation"), (-1.0, "baseline", "tuned_violation")),
                "less",
                noise="max_violation",
            ),
        ),
        {"treated": TUNED_FROZEN, "baseline": TUNED},
        {"treated": TUNED, "baseline": TUNED},
        name="freezing-the-router-steadies-tuning",
        theme="architectures",
        hypothesis="Freezing the router for the first 100 steps of fine-tuning keeps it balanced",
        where=f"{PRODUCTION}: freeze it for 100 steps to stabilise",
        theirs="no figure",
        method="150 steps on C++ after training on all domains, routers left alone for 100 of them or not",
        control_is="routers trained in both",
    ),
)

CLAIMS = (*SHAPES, *ROUTERS, *LIMITS)
