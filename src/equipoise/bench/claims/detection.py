"""Claims about noticing: published rules and ours on routers that are well, and on routers that are broken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equipoise.bench.claims.balance import POST, PRODUCTION
from equipoise.bench.claims.claim import Bench, Claim, Reading
from equipoise.bench.claims.statistics import above, below
from equipoise.monitor.alerts import AlertBook
from equipoise.monitor.profiles import rules_of
from equipoise.monitor.stats import RoutingSums, routing_stats

THEME = "detection"
WINDOWS, LONGEST = 3, 10
PER_EXPERT = 130  # assignments in a window
DIM = 16


@dataclass(frozen=True)
class Router:
    """A linear router on tokens that share a direction. blow: logits on expert 0; negative kills it."""

    num_experts: int = 64
    k: int = 2
    blow: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Of a window."""
        return math.ceil(PER_EXPERT * self.num_experts / self.k)

    def logits(self, seed: int, window: int, broken: bool = True) -> Tensor:
        """(T, E) of one window. Directions of equal length: what differs between experts is chance and the fault."""
        generator = torch.Generator().manual_seed(seed)
        weight_ED = torch.randn(self.num_experts, DIM, generator=generator)
        weight_ED /= weight_ED.norm(dim=1, keepdim=True)
        noise = torch.Generator().manual_seed(1000 * seed + window + 1)
        x_TD = torch.randn(self.num_tokens, DIM, generator=noise)
        own_TE = torch.randn(self.num_tokens, self.num_experts, generator=noise)
        logits_TE = 0.3 * x_TD @ weight_ED.t() + own_TE
        logits_TE[:, 0] += self.blow * broken
        return logits_TE

    def sums(self, logits_TE: Tensor) -> RoutingSums:
        """What a recorder would hand over."""
        probs_TE = logits_TE.softmax(-1)
        counts_E = torch.bincount(logits_TE.topk(self.k).indices.flatten(), minlength=self.num_experts)
        return RoutingSums(
            num_tokens=len(logits_TE),
            counts_E=counts_E.numpy().astype(np.int64),
            probs_sum_E=probs_TE.double().sum(0).numpy(),
            token_entropy_sum=float(torch.special.entr(probs_TE).sum()),
            logit_sum=float(logits_TE.sum()),
            logit_sq_sum=float(logits_TE.double().square().sum()),
            logsumexp_sum=float(logits_TE.logsumexp(-1).sum()),
            dropped={},
            losses={},
        )


def windows_to_alarm(router: Router, seed: int) -> int:
    """Windows from the fault to our first alert, LONGEST + 1 where none comes; healthy windows come first."""
    rules, book = rules_of("relative"), AlertBook()
    for window in range(-LONGEST, LONGEST):
        sums = router.sums(router.logits(seed, window + LONGEST, broken=window >= 0))
        stats = [routing_stats("0", window, sums)]
        changed = book.observe(window + LONGEST, [finding for rule in rules for finding in rule(stats)])
        if window >= 0 and any(alert.state == "firing" for alert in changed):
            return window + 1
    return LONGEST + 1


def delay(bench: Bench, router: Router) -> list[Reading]:
    """Of our rules."""
    values = tuple(float(windows_to_alarm(router, seed)) for seed in range(bench.trials))
    return [Reading("windows until our alert", "", values, below(WINDOWS + 0.5))]


# ----------------------------------------------------------------------------------------------- rules as published

Rule = Callable[[Router, Tensor], bool]


def below_five_percent(router: Router, logits_TE: Tensor) -> bool:
    """Any expert that is the first choice of less than 5 % of the tokens."""
    first_E = torch.bincount(logits_TE.argmax(-1), minlength=router.num_experts)
    return bool((first_E < 0.05 * len(logits_TE)).any())


def hot_or_cold_mass(router: Router, logits_TE: Tensor) -> bool:
    """Any expert whose sum of probabilities is beyond 1.25 times, or below a tenth of, tokens over experts."""
    mass_E = logits_TE.softmax(-1).sum(0)
    fair = len(logits_TE) / router.num_experts
    return bool(((mass_E > 1.25 * fair) | (mass_E < 0.1 * fair)).any())


def above_eighty_percent(router: Router, logits_TE: Tensor) -> bool:
    """Any expert that more than 80 % of the tokens choose."""
    counts_E = torch.bincount(logits_TE.topk(router.k).indices.flatten(), minlength=router.num_experts)
    return bool((counts_E > 0.8 * len(logits_TE)).any())


@dataclass(frozen=True)
class Watched:
    """A published rule on a router, one window each. squeeze: logits are multiplied so, which moves no choice."""

    rule: Rule
    router: Router
    squeeze: float = 1.0


def quiet(bench: Bench, watched: Watched) -> list[Reading]:
    """Share of windows with an alarm, where there should be none."""
    return [Reading("share of windows with an alarm", "", _alarms(bench, watched), below(0.05))]


def alarmed(bench: Bench, watched: Watched) -> list[Reading]:
    """Share of windows with an alarm, where there should be one."""
    return [Reading("share of windows with an alarm", "", _alarms(bench, watched), above(0.95))]


def _alarms(bench: Bench, watched: Watched) -> tuple[float, ...]:
    router = watched.router
    return tuple(float(watched.rule(router, watched.squeeze * router.logits(seed, 0))) for seed in range(bench.trials))


SMALL = Router(8)
SLIGHT = Router(8, blow=1.5)  # the busiest expert has about three times its share

CLAIMS = (
    Claim(
        name="collapse-is-noticed-in-three-windows",
        theme=THEME,
        hypothesis="A collapse is noticed within three windows of 130 assignments per expert",
        where=f"{PRODUCTION}: a dashboard noticed after 30 minutes, nobody in two weeks without",
        theirs="30 minutes against 2 weeks",
        method="our rules and alert book, 64 experts, top-2, one expert 20 logits up after ten healthy windows",
        control_is="nothing broken: there must be no alert",
        measure=delay,
        setup=Router(blow=20.0),
        control=Router(),
        seconds=8.0,
    ),
    Claim(
        name="5-percent-rule-is-quiet-in-health",
        theme=THEME,
        hypothesis="An alarm for experts below 5 % of the tokens is quiet while all is well",
        where=f"{PRODUCTION}: add alerts for any expert below 5 %",
        theirs="5 %",
        method="healthy routers of 64 experts, whose fair share of first choices is 1.6 %",
        control_is="a dead expert of 8, at which it should fire",
        measure=quiet,
        setup=Watched(below_five_percent, Router()),
        control=Watched(below_five_percent, Router(8, blow=-30.0)),
        present=Watched(below_five_percent, SMALL),
        present_is="8 experts, for which it was made",
        seconds=0.4,
    ),
    Claim(
        name="80-percent-rule-catches-collapse",
        theme=THEME,
        hypothesis="An alarm at 80 % of the tokens catches a collapse",
        where=f"{PRODUCTION}: alert on expert utilisation above 80 %",
        theirs="80 %",
        method="one expert of 64 that 56 % of the tokens choose, 18 times its fair share",
        control_is="nothing broken",
        measure=alarmed,
        setup=Watched(above_eighty_percent, Router(blow=2.2)),
        control=Watched(above_eighty_percent, Router()),
        present=Watched(above_eighty_percent, Router(blow=20.0)),
        present_is="20 logits: all of the tokens",
        seconds=0.4,
    ),
    Claim(
        name="probability-mass-shows-load",
        theme=THEME,
        hypothesis="Sums of the router's probabilities show hot and cold experts",
        where=f"{POST}: its health check adds up probabilities",
        theirs="hot above 1.25 times, cold below a tenth",
        method="a router of 8, its busiest expert at three times its share, logits so small that all seem equal",
        control_is="nothing broken, the same small logits",
        measure=alarmed,
        setup=Watched(hot_or_cold_mass, SLIGHT, squeeze=0.05),
        control=Watched(hot_or_cold_mass, SMALL, squeeze=0.05),
        present=Watched(hot_or_cold_mass, Router(8, blow=20.0)),
        present_is="20 logits at full size",
        seconds=0.2,
    ),
)
