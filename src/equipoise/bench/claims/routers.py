"""Claims about routers that need no training: temperature, saturation, hash loads, leaks, the way out of a collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from equipoise.bench.claims.arms import COEF
from equipoise.bench.claims.balance import EXPLAINER, PRODUCTION
from equipoise.bench.claims.claim import Bench, Claim, Reading
from equipoise.bench.claims.statistics import above, below
from equipoise.routing import ExpertChoice, Hash, TopK
from equipoise.routing.balancers import bias_step, quantile_bias
from equipoise.routing.losses import switch_loss
from equipoise.routing.router import Router, RouterConfig

THEME = "routers"
TOKENS, DIM, EXPERTS, K = 2048, 32, 8, 2


@dataclass(frozen=True)
class Temperatures:
    """Logits of a standard deviation, at two temperatures. other: with another router at the lower one."""

    low: float
    std: float = 2.1
    high: float = 1.0
    other: bool = False


def _router(config: RouterConfig, seed: int, std: float = 1.0) -> tuple[Router, Tensor]:
    """(the router in eval, tokens) whose logits have that standard deviation."""
    torch.manual_seed(seed)
    router = config.build(DIM, EXPERTS).eval()
    router.init_weights(std / math.sqrt(DIM))
    return router, torch.randn(TOKENS, DIM)


@torch.no_grad()
def changed_choices(bench: Bench, setup: Temperatures) -> list[Reading]:
    """Share of the assignments that are others at the lower temperature."""
    values = []
    for seed in range(bench.trials):
        low, _ = _router(TopK(k=K, temperature=setup.low), seed + setup.other, setup.std)
        high, x_TD = _router(TopK(k=K, temperature=setup.high), seed, setup.std)
        lost_TE = _chosen(high, x_TD) & ~_chosen(low, x_TD)
        values.append(float(lost_TE.sum() / (TOKENS * K)))
    return [Reading("share of choices that change", "", tuple(values), above(0.0))]


@torch.no_grad()
def less_saturated(bench: Bench, setup: Temperatures) -> list[Reading]:
    """The mean largest probability, at the lower temperature minus at the higher."""
    values = []
    for seed in range(bench.trials):
        router, x_TD = _router(TopK(k=K), seed, setup.std)
        logits_TE = router(x_TD).logits_TE
        low, high = ((logits_TE / t).softmax(-1).amax(-1).mean() for t in (setup.low, setup.high))
        values.append(float(low - high))
    return [Reading("largest probability, low minus high temperature", "", tuple(values), below(0.0))]


def spread_ratio(bench: Bench, stds: tuple[float, float]) -> list[Reading]:
    """Of the logits' standard deviations in the incident over those of training."""
    return [Reading("standard deviation, incident over training", "", (stds[0] / stds[1],), above(5.0), "exact")]


# ------------------------------------------------------------------------------------------------------ leaks, loads


@torch.no_grad()
def future_changes_the_past(bench: Bench, config: RouterConfig) -> list[Reading]:
    """Share of a batch's first half whose experts are others when the second half is."""
    values = []
    for seed in range(bench.trials):
        router, x_TD = _router(config, seed)
        other_TD = torch.cat((x_TD[: TOKENS // 2], torch.randn(TOKENS // 2, DIM) * 2))
        before_TE, after_TE = (_chosen(router, each)[: TOKENS // 2] for each in (x_TD, other_TD))
        values.append(float((before_TE != after_TE).any(-1).float().mean()))
    return [Reading("earlier tokens whose experts a later token changes", "", tuple(values), above(0.0))]


def _chosen(router: Router, x_TD: Tensor) -> Tensor:
    """bool (T, E)."""
    decision = router(x_TD)
    chosen_TE = torch.zeros(len(x_TD), EXPERTS, dtype=torch.bool)
    chosen_TE[decision.token_ids_N, decision.expert_ids_N] = True
    return chosen_TE


@dataclass(frozen=True)
class Text:
    """Token ids as frequent as Zipf's law has them, or all as frequent. balanced: a table that knows how frequent."""

    table: Literal["random", "balanced"] = "random"
    zipf: bool = True
    vocab_size: int = 4096


def hash_violation(bench: Bench, text: Text) -> list[Reading]:
    """MaxVio of hash routing beyond a fair router's at the same number of tokens."""
    weights_V = 1 / np.arange(1, text.vocab_size + 1) if text.zipf else np.ones(text.vocab_size)
    shares_V = weights_V / weights_V.sum()
    values = []
    for seed in range(bench.trials):
        rng = np.random.default_rng(seed)
        router = Hash(vocab_size=text.vocab_size, k=1, table=text.table, seed=seed).build(DIM, EXPERTS)
        if text.table == "balanced":
            router.fit(torch.from_numpy(shares_V))
        ids_T = torch.from_numpy(rng.choice(text.vocab_size, size=TOKENS, p=shares_V))
        counts_E = torch.bincount(router(torch.zeros(TOKENS, DIM), None, ids_T).expert_ids_N, minlength=EXPERTS)
        fair_E = np.bincount(rng.integers(EXPERTS, size=TOKENS), minlength=EXPERTS)
        values.append(float(counts_E.max() / counts_E.float().mean() - fair_E.max() / fair_E.mean()))
    return [Reading("MaxVio beyond a fair router's", "", tuple(values), below(0.1))]


# --------------------------------------------------------------------------------------------------- out of a collapse

MAX_STEPS, EVEN = 400, 0.5


@dataclass(frozen=True)
class Recovery:
    """blow: logits added to one expert. by: what balances. limit: steps in which it is claimed to be even again.

    rate: of the bias's steps, for "sign".
    """

    by: Literal["quantile", "sign", "loss", "nothing"]
    blow: float = 20.0
    limit: float = 5.0
    rate: float = 0.05


def steps_to_even(setup: Recovery, seed: int) -> int:
    """Steps until MaxVio is below EVEN, fresh tokens each; MAX_STEPS when it never is."""
    generator = torch.Generator().manual_seed(seed)
    weight_ED = torch.randn(EXPERTS, DIM, generator=generator) / math.sqrt(DIM)
    weight_ED[0, 0] += setup.blow  # the first direction is 1 for all tokens
    bias_E = torch.zeros(EXPERTS)
    weight_ED.requires_grad_(setup.by == "loss")
    optimizer = torch.optim.AdamW([weight_ED], lr=3e-3, weight_decay=0.0) if setup.by == "loss" else None
    for step in range(MAX_STEPS):
        x_TD = torch.randn(TOKENS // 4, DIM, generator=generator)
        x_TD[:, 0] = 1.0
        logits_TE = x_TD @ weight_ED.t()
        counts_E = torch.bincount((logits_TE.detach() + bias_E).topk(K).indices.flatten(), minlength=EXPERTS)
        if float(counts_E.max() / counts_E.float().mean()) - 1 < EVEN:
            return step
        if setup.by == "quantile":
            bias_E = quantile_bias(logits_TE, bias_E, K)
        elif setup.by == "sign":
            bias_E = bias_E + bias_step(counts_E, setup.rate, "sign")
        elif optimizer is not None:
            loss = COEF * switch_loss(logits_TE.softmax(-1), counts_E / counts_E.sum())
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return MAX_STEPS


def recovery_time(bench: Bench, setup: Recovery) -> list[Reading]:
    """Steps to an even load."""
    values = tuple(float(steps_to_even(setup, seed)) for seed in range(max(5, bench.trials // 4)))
    return [Reading(f"steps until MaxVio is below {EVEN:g}, at most {MAX_STEPS}", "", values, below(setup.limit))]


# ------------------------------------------------------------------------------------------------------------- losses


def loss_at_collapse(bench: Bench, shares: Sequence[float]) -> list[Reading]:
    """The Switch loss when loads and probabilities are these."""
    share_E = torch.tensor(shares)
    value = float(switch_loss(share_E[None], share_E))
    return [Reading("Switch loss before its coefficient", "", (value,), below(0.5), "exact")]


CLAIMS = (
    Claim(
        name="r10-temperature-moves-load",
        theme=THEME,
        hypothesis="A lower router temperature at inference spreads the load",
        where=f"{PRODUCTION}: set it to 0.3 and the collapse was over",
        theirs="6 of 8 experts came back",
        method="choices at temperature 0.3 against 1, logits of standard deviation 2.1",
        control_is="temperature 1 in both",
        measure=changed_choices,
        setup=Temperatures(0.3),
        control=Temperatures(1.0),
        present=Temperatures(0.3, other=True),
        present_is="another router at 0.3",
        seconds=0.3,
    ),
    Claim(
        name="low-temperature-prevents-saturation",
        theme=THEME,
        hypothesis="A lower temperature keeps the router's softmax from saturating",
        where=f"{PRODUCTION}: 1.0 saturates the logits, use 0.3",
        theirs="0.3 against 1.0",
        method="mean largest probability at 0.3 minus at 1, logits of standard deviation 2.1",
        control_is="temperature 1 in both",
        measure=less_saturated,
        setup=Temperatures(0.3),
        control=Temperatures(1.0),
        present=Temperatures(3.0),
        present_is="temperature 3, which flattens",
        seconds=0.3,
    ),
    Claim(
        name="five-times-std-would-have-fired",
        theme=THEME,
        hypothesis="An alarm at 5 times the training's standard deviation catches the incident that it came from",
        where=f"{PRODUCTION}: logits of 8.2 in the incident, 2.1 in training",
        theirs="alarm above 5 times",
        method="arithmetic on its own two numbers",
        control_is="no change at all",
        measure=spread_ratio,
        setup=(8.2, 2.1),
        control=(2.1, 2.1),
        present=(21.0, 2.1),
        present_is="ten times as wide",
        seconds=0.0,
    ),
    Claim(
        name="loss-is-zero-at-collapse",
        theme=THEME,
        hypothesis="The balancing loss was 0.0 because all tokens went to one expert",
        where=f"{PRODUCTION}: so explained in a collapse after 100 steps",
        theirs="0.0",
        method="the Switch loss, k-normalised, of one expert with everything, 8 experts",
        control_is="an even load, where it is 1",
        measure=loss_at_collapse,
        setup=(1.0, 0, 0, 0, 0, 0, 0, 0),
        control=(0.125,) * 8,
        seconds=0.0,
    ),
    Claim(
        name="r6-hash-never-collapses",
        theme=THEME,
        hypothesis="Hash routing is balanced: no preferences, no collapse",
        where=f"{EXPLAINER}: no feedback, no collapse",
        theirs="no figure",
        method="MaxVio of a random table on token ids of Zipf's frequencies, 8 experts, beyond a fair router's",
        control_is="a vocabulary of 64, where the most frequent id alone is a fifth of the text",
        measure=hash_violation,
        setup=Text(),
        control=Text(vocab_size=64),
        present=Text("balanced", zipf=False),
        present_is="a balanced table of ids that are all as frequent",
        seconds=1.5,
    ),
    Claim(
        name="r13-expert-choice-leaks",
        theme=THEME,
        hypothesis="Expert choice lets later tokens decide where earlier ones go",
        where="arXiv 2202.09368 and its critics: not causal",
        theirs="no figure",
        method="experts of a batch's first half, with another second half",
        control_is="top-2, where a token decides for itself",
        measure=future_changes_the_past,
        setup=ExpertChoice(k=K),
        control=TopK(k=K),
        seconds=0.3,
    ),
    *(
        Claim(
            name=f"r4-{name}",
            theme=THEME,
            hypothesis=hypothesis,
            where=where,
            theirs=theirs,
            method=f"+20 logits on one expert of 8, fresh tokens each step; even again within {setup.limit:g} steps",
            control_is="nothing that balances",
            measure=recovery_time,
            setup=setup,
            control=Recovery("nothing", limit=setup.limit),
            present=present,
            present_is=present_is,
            seconds=seconds,
        )
        for name, hypothesis, where, theirs, setup, present, present_is, seconds in (
            (
                "quantile-recovers-at-once",
                "Quantile balancing evens a saturated router within 5 steps",
                "kexue.fm/11619",
                "a few steps",
                Recovery("quantile"),
                None,
                "",
                0.2,
            ),
            (
                "the-loss-recovers-from-saturation",
                "A balancing loss recovers a router that has collapsed",
                f"{PRODUCTION}: fix it by a higher balancing loss",
                "0.01 in place of 0.001",
                Recovery("loss", limit=200.0),
                Recovery("loss", blow=1.0, limit=200.0),
                "one logit in place of 20",
                4.0,
            ),
        )
    ),
)
