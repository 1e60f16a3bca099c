"""What is sent and how long it takes: against DeepEP's published figures, by hand, against routing that is drawn."""

from dataclasses import replace
from math import log, sqrt

import numpy as np
import pytest

from equipoise.plan.fit.architecture import Routed
from equipoise.plan.fit.communication import Machine, communicate, destinations, experts_met, work_seconds
from equipoise.plan.fit.imbalance import SKEW, chance_max_vio, max_vio
from equipoise.plan.fit.known import KNOWN
from equipoise.plan.fit.setup import Mesh, Setup, Training
from equipoise.plan.links import Cost

V3, MIXTRAL = KNOWN["deepseek-v3"].model, KNOWN["mixtral-8x7b"].model


def routed(num, k):
    return Routed(num=num, k=k, hidden_dim=8, router_parameters=0)


@pytest.mark.parametrize(("ranks", "k", "expected"), [(8, 8, 5.25), (64, 8, 7.58), (4, 2, 1.75), (1, 8, 1.0)])
def test_distinct_ranks(ranks, k, expected):
    assert destinations(ranks, routed(256, k)) == pytest.approx(expected, abs=0.005)


def test_distinct_ranks_are_those_of_drawn_choices():
    rng = np.random.default_rng(0)
    ranks = rng.integers(0, 8, (200_000, 6))
    distinct = np.array([(ranks == r).any(axis=1) for r in range(8)])
    assert destinations(8, routed(64, 6)) == pytest.approx(distinct.sum(axis=0).mean(), rel=0.005)
    home = rng.integers(0, 8, 200_000)
    away = distinct.sum(axis=0) - distinct[home, np.arange(200_000)]
    assert destinations(8, routed(64, 6), remote=True) == pytest.approx(away.mean(), rel=0.005)


def test_groups_of_experts_keep_tokens_on_fewer_ranks():
    """DeepSeek-V3 on 64 ranks: 4 of 8 groups are 32 ranks, any of which a choice may be on."""
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((20_000, 8)), axis=1)[:, :4]  # groups of 8 ranks
    ranks = np.take_along_axis(chosen, rng.integers(0, 4, (20_000, 8)), axis=1) * 8 + rng.integers(0, 8, (20_000, 8))
    distinct = np.mean([len(set(row)) for row in ranks.tolist()])
    assert destinations(64, V3.routed) == pytest.approx(distinct, rel=0.005)
    assert destinations(64, V3.routed) < destinations(64, replace(V3.routed, groups=1, top_groups=1))
    assert destinations(4, V3.routed) <= 4  # two groups of experts on each rank


# DeepEP, docs/legacy.md: DeepSeek-V3's dim 7168 and k = 8. Decoding sends a row per expert, training one per group of
# ranks. (tokens, groups, bytes of an element, 1e9 bytes/s, megabytes, microseconds)
DEEP_EP = [
    (128, 0, 1, 98, 7.34, 77),
    (128, 0, 2, 127, 14.68, 114),
    (128, 0, 1, 39, 7.34, 194),
    (128, 0, 2, 40, 14.68, 360),
    (4096, 4, 1, 50, 117.4, 2300),
    (4096, 4, 2, 50, 234.9, 4700),
]


@pytest.mark.parametrize(("tokens", "groups", "size", "rate", "megabytes", "microseconds"), DEEP_EP)
def test_bytes_and_times_of_deep_ep(tokens, groups, size, rate, megabytes, microseconds):
    copies = destinations(64, V3.routed, distinct=False, groups=groups)
    sent = tokens * copies * V3.dim * size
    assert sent / 1e6 == pytest.approx(megabytes, rel=0.002)
    assert 1e6 * Cost(0.0, rate * 1e9).seconds(sent) == pytest.approx(microseconds, rel=0.04)


def test_a_decoding_step_of_deepseek_v3_on_256_ranks():
    """58 layers of 0.194 + 0.360 ms: 32 ms, where an article says 300 ms per layer."""
    machine = Machine(link=Cost(0.0, 39.5e9), dispatch=1.0, combine=2.0, distinct=False)
    setup = Setup(mesh=Mesh(expert=256), batch=128, imbalance=0.0)
    assert communicate(V3, setup, machine).step_s == pytest.approx(32e-3, rel=0.03)


def test_only_the_width_of_experts_changes_exchange_over_products():
    """P F / (6 m B) (1 - 1/R), without deduplication: neither k nor the number of experts nor dim is in it."""
    machine = Machine(link=Cost(0.0, 50e9), flops=400e12, distinct=False)
    setup = Setup(mesh=Mesh(expert=8), work=Training(), batch=1, context=512, imbalance=0.0)
    expected = 4 * 400e12 / (6 * 14336 * 50e9) * 7 / 8
    assert communicate(MIXTRAL, setup, machine).ratio == pytest.approx(expected, rel=1e-6)
    other = replace(MIXTRAL, dim=2048, routed=replace(MIXTRAL.routed, num=64, k=8))
    assert communicate(other, setup, machine).ratio == pytest.approx(expected, rel=1e-6)
    narrow = replace(MIXTRAL, routed=replace(MIXTRAL.routed, hidden_dim=7168))
    assert communicate(narrow, setup, machine).ratio == pytest.approx(2 * expected, rel=1e-6)


def test_imbalance_latency_and_backward_are_counted():
    link = Cost(1e-4, 1e9)
    base = Setup(mesh=Mesh(expert=8), batch=4, imbalance=0.0)
    even = communicate(MIXTRAL, base, Machine(link=link))
    # 4 tokens, 7 (1 - (7/8)^2) = 1.640625 other ranks, 4096 elements of 2 bytes
    assert even.dispatch_bytes == even.combine_bytes == round(4 * 1.640625 * 8192)
    assert even.dispatch_s == pytest.approx(1e-4 + 53760e-9)
    assert even.step_s == pytest.approx(32 * 2 * even.dispatch_s)
    uneven = communicate(MIXTRAL, replace(base, imbalance=1.0), Machine(link=link))
    assert uneven.dispatch_s == pytest.approx(1e-4 + 2 * 53760e-9)
    trained = communicate(MIXTRAL, replace(base, work=Training(), context=1), Machine(link=link))
    assert trained.step_s == pytest.approx(2 * even.step_s)
    assert 0 < even.step_share < 1


def test_nothing_is_sent_on_one_rank():
    alone = communicate(MIXTRAL, Setup(mesh=Mesh(data=8)), Machine())
    assert alone.step_s == alone.step_share == alone.dispatch_bytes == 0
    assert alone.work_s > 0


def test_a_small_step_reads_and_a_large_one_computes():
    machine = Machine()
    one = Setup(batch=1, context=1)
    # one token reads the active weights but the input's table: 2 * 12.749 B, and a token of cache
    assert work_seconds(MIXTRAL, one, machine, 1) == pytest.approx((2 * 12.7488e9 + 131_072) / 3.35e12, rel=1e-3)
    many = work_seconds(MIXTRAL, replace(one, batch=100_000), machine, 100_000)
    assert many == pytest.approx(100_000 * 2 * 12.7488e9 / 400e12, rel=0.01)


def test_experts_met_are_those_of_drawn_choices():
    rng = np.random.default_rng(0)
    met = [len(np.unique([rng.choice(64, 6, replace=False) for _ in range(10)])) / 64 for _ in range(400)]
    model = replace(MIXTRAL, routed=routed(64, 6))
    assert experts_met(model, 10) == pytest.approx(np.mean(met), rel=0.01)


# ---------------------------------------------------------------------------------------------- imbalance


@pytest.mark.parametrize(("ranks", "assignments"), [(8, 4096), (16, 32768), (64, 65536)])
def test_chance_is_what_fair_dice_do(ranks, assignments):
    counts = np.random.default_rng(0).multinomial(assignments, np.full(ranks, 1 / ranks), size=20_000)
    found = np.quantile(counts.max(axis=1) / (assignments / ranks) - 1, 0.99)
    assert chance_max_vio(assignments, ranks) == pytest.approx(found, rel=0.05)
    assert chance_max_vio(assignments, ranks) > sqrt(2 * log(ranks) * ranks / assignments)  # which is about the median


def test_room_is_left_for_chance_and_skew():
    assert max_vio(4096, 8, None) == pytest.approx((1 + SKEW) * (1 + chance_max_vio(4096, 8)) - 1)
    assert max_vio(4096, 8, 0.25) == 0.25
    assert max_vio(4096, 1, 0.25) == chance_max_vio(4096, 1) == 0
    assert max_vio(2, 8, None) == 7.0  # at most all of it


@pytest.mark.parametrize(("name", "value"), [("flops", 0), ("memory", -1.0), ("dispatch", float("nan"))])
def test_impossible_machines_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected more than 0, got"):
        Machine(**{name: value})
