"""False alarms of a whole model: bounds beside exact tails, rates beside simulated fair routers, and what they cost."""

import math
from fractions import Fraction

import numpy as np
import pytest

from equipoise.layer.drop_rate import expected_drop_rate
from equipoise.monitor.baseline import baselines_of
from equipoise.monitor.chance import FALSE_ALARMS, highest_share, needed_nats, share_nats, uneven_nats
from equipoise.monitor.detectors import CollapseDetector
from equipoise.monitor.rules import DropRule, LoadDriftRule
from equipoise.monitor.stats import RoutingSums, routing_stats

RATE, WINDOWS = 0.2, 300  # often enough to be counted in a test
CHANCE_ALONE = CollapseDetector(1.0, effective_ratio=1 - 1e-9, hot_excess=1e-9, hot_load=1 + 1e-9, false_alarms=RATE)


def record(counts_E, num_tokens, layer, dropped=0):
    probs_sum_E = counts_E * (num_tokens / counts_E.sum())
    sums = RoutingSums(num_tokens, counts_E, probs_sum_E, 0.0, 0.0, 0.0, 0.0, {"capacity": dropped}, {})
    return routing_stats(f"layers.{layer}", 1, sums)


def fair_window(rng, num_layers, num_experts, top_k, num_tokens):
    """A fair router in each layer: every token picks top_k distinct experts, all of them alike."""
    keys_LTE = rng.random((num_layers, num_tokens, num_experts))
    chosen = np.argpartition(keys_LTE, top_k - 1, axis=2)[:, :, :top_k].reshape(num_layers, -1)
    return [record(np.bincount(row, minlength=num_experts), num_tokens, i) for i, row in enumerate(chosen)]


def share_of_windows(rule, windows):
    return sum(bool(rule(window)) for window in windows) / len(windows)


# ------------------------------------------------------------------------------------------------- bounds


def binomial_tail(least, num, fair):
    """P(X >= least), exactly."""
    p = Fraction(fair)
    return float(sum(math.comb(num, x) * p**x * (1 - p) ** (num - x) for x in range(least, num + 1)))


@pytest.mark.parametrize(("num", "fair"), [(10, 0.5), (40, 0.125), (90, 0.25), (100, 1 / 64)])
def test_a_bound_is_never_below_the_exact_tail_and_not_far_above(num, fair):
    for count in range(math.ceil(num * fair) + 1, num + 1):
        exact, bound = binomial_tail(count, num, fair), math.exp(-share_nats(count / num, fair, num))
        assert exact <= bound * (1 + 1e-9)
        assert bound <= exact * 4 * math.sqrt(num)


def test_shares_by_hand():
    assert share_nats(1.0, 0.5, 10) == pytest.approx(10 * math.log(2))  # ten heads of ten
    assert share_nats(0.5, 0.5, 10) == share_nats(0.2, 0.5, 10) == 0.0
    assert share_nats(0.1, 0.0, 10) == math.inf
    assert highest_share(0.5, 10, 10 * math.log(2)) == pytest.approx(1.0)
    assert highest_share(0.5, 10, 7.0) == math.inf  # ten heads are 6.93 nats
    assert highest_share(0.25, 400, share_nats(0.4, 0.25, 400)) == pytest.approx(0.4)


def test_uneven_loads_by_hand():
    # 40 assignments to one of four: KL is ln 4, 40 ln 4 = 55.45 nats, less 3 ln(e * 55.45 / 3) = 11.75
    assert uneven_nats(np.array([40, 0, 0, 0])) == pytest.approx(43.70, abs=0.01)
    assert uneven_nats(np.array([10, 10, 10, 10])) == 0.0
    assert uneven_nats(np.array([12, 8, 11, 9])) == 0.0  # 0.4 nats, of which chance gives one per expert
    assert uneven_nats(np.array([7])) == uneven_nats(np.zeros(4, dtype=np.int64)) == 0.0


# ------------------------------------------------------------------------------------------------- rates


@pytest.mark.parametrize(("layers", "experts", "top_k", "tokens"), [(4, 8, 1, 64), (24, 8, 2, 100), (12, 32, 4, 60)])
def test_all_layers_and_experts_of_a_fair_model_share_the_rate(layers, experts, top_k, tokens):
    """Judged one layer at a time, as if each were a model, far more windows have a finding: the control matters."""
    rng = np.random.default_rng(0)
    windows = [fair_window(rng, layers, experts, top_k, tokens) for _ in range(WINDOWS)]
    together = share_of_windows(CHANCE_ALONE, windows)
    alone = share_of_windows(lambda window: [f for stats in window for f in CHANCE_ALONE([stats])], windows)
    assert together <= RATE
    assert alone > 2 * together
    assert alone > 0.02


def test_two_samples_of_a_model_drift_as_rarely_as_promised():
    """chi^2 is an approximation, so three standard errors are allowed: 0.2 + 3 sqrt(0.2 * 0.8 / 300) = 0.27."""
    rng = np.random.default_rng(1)
    windows, baselines = [], []
    for _ in range(WINDOWS):
        share_LE = rng.dirichlet(np.full(32, 4.0), size=12)  # no layer is even, and that is no drift
        then, now = (
            [record(rng.multinomial(3200, share_E), 1600, i) for i, share_E in enumerate(share_LE)] for _ in (0, 1)
        )
        windows.append(now)
        baselines.append(baselines_of(then))
    found, alone = 0, 0
    for window, known in zip(windows, baselines, strict=True):
        rule = LoadDriftRule(known, limit=0.0, false_alarms=RATE)
        found += bool(rule(window))
        alone += any(rule([stats]) for stats in window)
    assert 0.1 < found / WINDOWS < 0.27
    assert alone / WINDOWS > 0.6  # 1 - 0.8^12 = 0.93 if each layer had the rate to itself


def test_layers_that_lose_as_much_as_a_level_are_above_it_as_rarely_as_promised():
    rng = np.random.default_rng(2)
    counts_E = np.full(8, 2500)
    windows = [
        [record(counts_E, 10_000, i, dropped) for i, dropped in enumerate(rng.binomial(20_000, 0.01, size=24))]
        for _ in range(WINDOWS)
    ]
    rule = DropRule(levels=((0.01, "warning"),), false_alarms=RATE)
    together = share_of_windows(rule, windows)
    alone = share_of_windows(lambda window: [f for stats in window for f in rule([stats])], windows)
    assert 0 < together <= RATE
    assert alone > 0.5


def test_what_a_capacity_loses_comes_in_clumps_which_no_such_rate_covers():
    """Why `DropRule` promises nothing there: half of a level is above it in a tenth of the windows of one batch."""
    rng, num_tokens, factor = np.random.default_rng(3), 1024, 1.1
    level = 2 * expected_drop_rate(factor, num_tokens, 2, 8)  # 0.14 %
    windows = []
    for _ in range(60):
        fair = fair_window(rng, 24, 8, 2, num_tokens)
        lost = [int(np.maximum(stats.counts_E - math.ceil(factor * 256), 0).sum()) for stats in fair]
        windows.append([record(s.counts_E, num_tokens, i, n) for i, (s, n) in enumerate(zip(fair, lost, strict=True))])
    assert 0.05 < share_of_windows(DropRule(levels=((level, "warning"),)), windows) < 0.2


# ------------------------------------------------------------------------------------------------- what it costs


def test_with_enough_assignments_the_limit_is_that_of_a_layer_alone():
    """128 layers of E experts at 100 assignments each: what chance explains stays below halfway to all tokens."""
    detect = CollapseDetector()
    for num_experts in (2, 4, 8, 16, 64, 256, 512):
        for top_k in (k for k in (1, 2, 4, 8) if k < num_experts):
            fair, num_tokens = top_k / num_experts, math.ceil(100 * num_experts / top_k)
            nats = needed_nats(128 * (num_experts + 1), FALSE_ALARMS)
            halfway = max(fair + 0.5 * (1 - fair), 1.5 * fair)
            assert highest_share(fair, num_tokens, nats) < halfway or halfway >= 1
            if halfway < 1:
                even = record(np.full(num_experts, 100), num_tokens, 0)
                assert detect.token_share_limit(even, nats) == detect.token_share_limit(even)


def test_one_collapsed_layer_of_61_with_256_experts_is_found_at_once_and_no_other():
    """15,616 experts at 100 assignments each: a thousand healthy windows of a layer, and one that has collapsed."""
    rng, detect = np.random.default_rng(4), CollapseDetector()
    fair = np.full(256, 1 / 256)
    for _ in range(17):  # 1,037 layers
        counts_LE = rng.multinomial(25_600, fair, size=61)
        window = [record(counts_E, 3200, layer) for layer, counts_E in enumerate(counts_LE)]
        assert detect(window) == []
        hot = np.full(256, 88)  # one expert in every token, the other seven choices shared evenly
        hot[9] = 3205
        window[33] = record(hot, 3205, 33)  # as good as 3205 * 8 assignments
        assert [(f.rule, f.layer, f.expert) for f in detect(window)] == [("collapse", "layers.33", 9)]
