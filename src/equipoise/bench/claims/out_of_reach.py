"""Claims that can't be tested on one machine without a GPU, and why; so that they are not forgotten."""

from __future__ import annotations

from equipoise.bench.claims.balance import EXPLAINER, PRODUCTION
from equipoise.bench.claims.claim import Claim

CLAIMS = tuple(
    Claim(
        name=name,
        theme="out of reach",
        hypothesis=hypothesis,
        where=where,
        theirs=theirs,
        method="none",
        untestable=why,
    )
    for name, hypothesis, where, theirs, why in (
        (
            "all-to-all-takes-300-ms",
            "Experts over 4 nodes add 300 ms per layer",
            f"{PRODUCTION}: said once of the P99, once of each layer",
            "300 ms",
            "needs nodes and their network; `equipoise plan` and `equipoise bench links` say what yours would take",
        ),
        (
            "communication-is-half-of-training",
            "Communication takes 40 to 50 % of training time at large scale",
            f"{EXPLAINER}: more than 40 %, more than 50 % before optimisation",
            "40 to 50 %",
            "needs hundreds of GPUs",
        ),
        (
            "collapse-within-two-hours-of-deployment",
            "A router with frozen weights collapses within two hours of serving",
            f"{PRODUCTION}: because the temperature was 1.0",
            "2 hours; P99 from 50 ms to 1.2 s",
            "frozen weights can't collapse; their inputs may have moved, and nobody has published those",
        ),
        (
            "attention-experts-at-4k",
            "Mixtures of attention are 10 % more accurate and 20 % slower than MoE at 4K of context",
            f"{PRODUCTION}: on a summarisation task",
            "10 %, 20 %",
            "task, data and models are not named, and 4K of context is too long for training on this machine",
        ),
    )
)
