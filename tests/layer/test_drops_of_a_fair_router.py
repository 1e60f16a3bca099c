"""How much a capacity drops when the router is fair and random: the counter against the closed form.

With k distinct experts drawn evenly for each of T tokens, an expert's load c is Binomial(T, k/E), of mean
mu = T k / E, and the share of assignments that is dropped is E[(c - C)+] / mu. What learned routers do is not here.
"""

import math

import pytest
import torch

from equipoise.layer import Capacity
from equipoise.layer.admission import Capped
from equipoise.types import RoutingDecision

E = 64
FACTORS = (0.5, 1.0, 1.25, 1.5, 2.0)
REPETITIONS = {4: 200, 16: 100, 64: 50, 256: 30}  # by mu; each is E samples of an expert's load
STANDARD_ERRORS = 5


def excess_moments(num_tokens: int, p: float, limit: int) -> tuple[float, float]:
    """E[(c - limit)+] and its variance for c ~ Binomial(num_tokens, p), exact up to rounding."""
    first = second = 0.0
    for c in range(limit + 1, num_tokens + 1):
        log_choose = math.lgamma(num_tokens + 1) - math.lgamma(c + 1) - math.lgamma(num_tokens - c + 1)
        probability = math.exp(log_choose + c * math.log(p) + (num_tokens - c) * math.log1p(-p))
        first += probability * (c - limit)
        second += probability * (c - limit) ** 2
    return first, second - first**2


def limit_of(factor: float, num_tokens: int, k: int) -> int:
    """C = ceil(factor T k / E), at least 1, at most T. The factors here are exact in binary."""
    return min(num_tokens, max(1, math.ceil(factor * num_tokens * k / E)))


def fair_decision(num_tokens: int, k: int, generator: torch.Generator) -> RoutingDecision:
    """k in (1, 2) distinct experts per token; each pair is as likely as any other."""
    first = torch.randint(E, (num_tokens, 1), generator=generator)
    ids = [first, (first + torch.randint(1, E, (num_tokens, 1), generator=generator)) % E][:k]
    even = torch.full((num_tokens, E), 1 / E)
    return RoutingDecision.from_topk(
        torch.cat(ids, 1), torch.full((num_tokens, k), 1 / k), probs_TE=even, logits_TE=torch.zeros_like(even)
    )


def dropped(decision: RoutingDecision, factor: float) -> tuple[int, int]:
    """(assignments dropped, tokens that lost all of theirs) as the layer counts them in training."""
    fitted = Capped(Capacity(factor)).admit(decision, True)
    return int(fitted.drops["capacity"]), int(fitted.drops["tokens"])


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("mu", REPETITIONS)
def test_drop_rate_of_a_fair_router_is_the_closed_form(mu, k):
    """The counter equals the excess of each batch exactly; its mean over batches is within 5 standard errors.

    The standard error is exact too, not estimated, so that rates of 1e-6 are judged as well: loads of one batch sum to
    T k, hence are negatively associated, and the variance of a batch's sum is at most E times that of one expert.
    """
    num_tokens, repetitions = mu * E // k, REPETITIONS[mu]
    generator = torch.Generator().manual_seed(100 * mu + k)
    total = dict.fromkeys(FACTORS, 0)
    for _ in range(repetitions):
        decision = fair_decision(num_tokens, k, generator)
        counts = torch.bincount(decision.expert_ids_N, minlength=E)
        for factor in FACTORS:
            count, _ = dropped(decision, factor)
            assert count == (counts - limit_of(factor, num_tokens, k)).clamp_min(0).sum()
            total[factor] += count
    for factor in FACTORS:
        mean, variance = excess_moments(num_tokens, k / E, limit_of(factor, num_tokens, k))
        tolerance = STANDARD_ERRORS * math.sqrt(variance / (E * repetitions)) / mu
        rate = total[factor] / (repetitions * num_tokens * k)
        assert abs(rate - mean / mu) <= tolerance, (factor, rate, mean / mu, tolerance)
        if factor <= 1:
            assert tolerance < 0.2 * mean / mu  # the comparison means something


@pytest.mark.parametrize("k", [1, 2])
def test_the_rule_of_thumb_is_near_the_closed_form(k):
    """0.4 / sqrt(mu) at factor 1, as `Capacity` says: c - mu is nearly normal, and E[z+] of a standard normal is 0.399.

    At mu = 16 a fair router drops 10 % (9.8 %), and to drop 0.1 % mu would have to be 160 thousand.
    """
    for mu in REPETITIONS:
        mean, _ = excess_moments(mu * E // k, k / E, mu)
        assert mean / mu == pytest.approx(math.sqrt((1 - k / E) / (2 * math.pi * mu)), rel=0.1 / mu)
        assert mean / mu == pytest.approx(0.4 / math.sqrt(mu), rel=0.05)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("factor", FACTORS)
def test_fully_dropped_tokens_equal_a_direct_count(factor, k):
    """In order of arrival: an assignment finds its expert full or not; a token that finds all full is lost."""
    num_tokens = 16 * E // k
    decision = fair_decision(num_tokens, k, torch.Generator().manual_seed(k))
    limit, loads = limit_of(factor, num_tokens, k), [0] * E
    reached, lost = set(), 0
    for token, expert in zip(decision.token_ids_N.tolist(), decision.expert_ids_N.tolist(), strict=True):
        if loads[expert] < limit:
            loads[expert] += 1
            reached.add(token)
        else:
            lost += 1
    assert dropped(decision, factor) == (lost, num_tokens - len(reached))
    assert lost > 0 or factor == 2  # where the rate is 1e-5
    assert k == 2 or num_tokens - len(reached) == lost  # with one expert per token both are the same
