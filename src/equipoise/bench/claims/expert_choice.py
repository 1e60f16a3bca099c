"""Claims about expert choice once it is trained: what its loss owes to later tokens, and what is left without them."""

from __future__ import annotations

from dataclasses import replace

from equipoise.bench.claims.architectures import CHOICE
from equipoise.bench.claims.arms import BALANCED
from equipoise.bench.claims.claim import Arm
from equipoise.bench.claims.contrast import LOSS_MARGIN, Contrast, Roles, training_claim
from equipoise.bench.claims.curves import Curve, Line, Panel
from equipoise.bench.claims.leak_probe import WAYS
from equipoise.bench.claims.routers import THEME
from equipoise.bench.claims.statistics import above

NUM_SEEDS = 3
CHOOSING = replace(CHOICE, label="expert choice, then one by one", probe="leak", num_seeds=NUM_SEEDS, seconds=20.0)
TAKING = replace(BALANCED, label="top-2, then one by one", probe="leak", num_seeds=NUM_SEEDS, seconds=20.0)
CRITICS = "arXiv 2408.15664, section 5.2 and appendix D: future tokens leak into the loss"


def ways(run: Arm) -> Roles:
    """A run's loss, taken together and one by one."""
    return {"together": run.at("together"), "prefix": run.at("prefix")}


CLAIMS = (
    training_claim(
        (
            Contrast(
                "share of earlier places whose prediction later tokens change",
                ((1.0, "run", "changed_share"),),
                above(0.0),
            ),
        ),
        {"run": CHOOSING.at("leak")},
        {"run": TAKING.at("leak")},
        name="r13-later-tokens-change-earlier-predictions",
        theme=THEME,
        hypothesis="In a language model of expert choice, later tokens change what is predicted before them",
        where=CRITICS,
        theirs="more than 50 bits a token in a model of theirs",
        method=f"{NUM_SEEDS} seeds; trained models, the second half of each sequence replaced, batches as in training",
        control_is="top-2, where a token decides for itself",
    ),
    training_claim(
        (
            Contrast(
                f"loss one by one minus together (margin {LOSS_MARGIN:g})",
                ((1.0, "prefix", "loss"), (-1.0, "together", "loss")),
                above(LOSS_MARGIN),
                "nats",
            ),
        ),
        ways(CHOOSING),
        ways(TAKING),
        name="r13-validation-is-not-generation",
        theme=THEME,
        hypothesis="The loss of expert choice in validation is not reached when tokens come one by one",
        where=CRITICS,
        theirs="10 % lower loss, abnormal",
        method=f"{NUM_SEEDS} seeds; 48 sequences of 64 tokens: each next token from its sequence's beginning alone, "
        "less all sequences in one forward",
        control_is="top-2",
    ),
    training_claim(
        (
            Contrast(
                "loss one by one, expert choice minus top-2",
                ((1.0, "choice", "loss"), (-1.0, "top-2", "loss")),
                "less",
                "nats",
            ),
        ),
        {"choice": CHOOSING.at("prefix"), "top-2": TAKING.at("prefix")},
        {"choice": TAKING.at("together"), "top-2": TAKING.at("prefix")},
        name="r13-expert-choice-generates-better",
        theme=THEME,
        hypothesis="Expert choice is better than top-2 where it counts, when text is generated",
        where="arXiv 2202.09368: experts take their tokens",
        theirs="twice as fast to the same loss, in validation",
        method=f"{NUM_SEEDS} seeds; as above; what it comes to in validation is `r13-expert-choice-looks-better`",
        control_is="top-2 in both places",
    ),
)

CURVES = (
    Curve(
        name="r13-ways",
        theme=THEME,
        title="The same text with ever fewer other tokens in the forward",
        axis="how the loss is taken",
        places=tuple(float(place) for place in range(len(WAYS))),
        ticks=tuple(WAYS),
        panels=(Panel("loss", "loss beyond that of top-2 together [nats]", beside=TAKING.at("together")),),
        lines=(
            Line("expert choice", tuple(CHOOSING.at(way) for way in WAYS)),
            Line("top-2", tuple(TAKING.at(way) for way in WAYS)),
        ),
        joined=False,
        note="together: 16 whole sequences, as in training; alone: one whole sequence; lock_step: the beginnings of "
        "16, anew for each next token; prefix: the beginning of one; cached: one token at a time, keys and values kept",
    ),
)
