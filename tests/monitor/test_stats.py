"""The statistics: golden numbers, ranges and invariances, and the same answers from NumPy and torch."""

import json
import math
import sqlite3
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.layer.capacity import Capacity
from equipoise.monitor import stats
from equipoise.monitor.stats import RoutingSums, merge, routing_stats
from equipoise.monitor.store import RunStore

LOGITS_TE = np.array([[2, 1, 0, -1], [1.5, 1.4, -0.5, 0.2], [3, 0.5, 0.4, 0.3], [0, 2, 1, -2]], dtype=np.float64)
PROBS_TE = np.exp(LOGITS_TE) / np.exp(LOGITS_TE).sum(1, keepdims=True)
COUNTS_E = np.array([3, 4, 1, 0])  # the top-2 of LOGITS_TE: [0,1], [0,1], [0,1], [1,2]

COUNT_STATISTICS = [
    stats.load_share,
    stats.load_entropy,
    stats.effective_experts,
    stats.max_violation,
    stats.coefficient_of_variation,
    stats.gini,
    stats.min_load,
    stats.straggler_factor,
]
counts = st.lists(st.integers(0, 10**6), min_size=1, max_size=64).map(np.array)


def sums_of(logits_TE, counts_E, **extra):
    """What a recorder would have added up over these tokens."""
    num_tokens = len(logits_TE)
    probs_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(1, keepdims=True)
    return RoutingSums(
        num_tokens=num_tokens,
        counts_E=np.asarray(counts_E, dtype=np.int64),
        probs_sum_E=probs_TE.sum(0),
        token_entropy_sum=float(-(probs_TE * np.log(probs_TE)).sum()),
        logit_sum=float(logits_TE.sum()),
        logit_sq_sum=float((logits_TE**2).sum()),
        logsumexp_sum=float(np.log(np.exp(logits_TE).sum(1)).sum()),
        dropped=extra.get("dropped", {}),
        losses=extra.get("losses", {}),
    )


@pytest.mark.parametrize("as_array", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
class TestGolden:
    """Four tokens, four experts, k = 2."""

    @pytest.mark.parametrize(
        ("function", "expected"),
        [
            (stats.max_violation, 1.0),  # 4 / mean(3, 4, 1, 0) - 1 = 4/2 - 1
            (stats.coefficient_of_variation, 0.790569),  # sqrt(mean(1, 4, 1, 4)) / 2
            (stats.gini, 0.4375),  # (-3*0 - 1*1 + 1*3 + 3*4) / (4 * 8)
            (stats.load_entropy, 0.70282),
            (stats.effective_experts, math.exp(0.70282 * math.log(4))),
            (stats.min_load, 0.0),
            (stats.straggler_factor, 2.0),  # 4 / 2
            (lambda counts_E: stats.rank_straggler_factor(counts_E, [0, 0, 1, 1], 2), 1.75),  # 7 of 8, 4 is fair
            (lambda counts_E: stats.rank_straggler_factor(counts_E, [0, 1, 0, 1], 2), 1.0),  # 4 and 4
            (lambda counts_E: stats.rank_straggler_factor(counts_E, [0, 1, 0, 1], 3), 1.5),  # rank 2 owns nobody
        ],
    )
    def test_of_the_counts(self, as_array, function, expected):
        assert float(function(as_array(COUNTS_E))) == pytest.approx(expected, rel=1e-5)

    def test_of_the_probabilities(self, as_array):
        probs_TE = as_array(PROBS_TE)
        assert float(stats.marginal_entropy(probs_TE)) == pytest.approx(1.117803, abs=1e-6)
        assert float(stats.token_entropy(probs_TE)) == pytest.approx(0.914616, abs=1e-6)
        assert float(stats.mutual_information(probs_TE)) == pytest.approx(0.203187, abs=1e-6)

    def test_of_the_logits(self, as_array):
        moments = stats.logit_moments(as_array(LOGITS_TE))
        assert float(moments.mean) == pytest.approx(LOGITS_TE.mean())
        assert float(moments.std) == pytest.approx(LOGITS_TE.std())
        # ln(e^2 + e + 1 + 1/e) = 2.440190 for the first token, and so on
        assert float(moments.logsumexp) == pytest.approx(np.log(np.exp(LOGITS_TE).sum(1)).mean())


class TestCounts:
    @pytest.mark.parametrize(
        ("num_experts", "expected", "floor"),
        [(64, 16, 0.721), (64, 64, 0.360), (64, 256, 0.180), (8, 16, 0.510), (8, 64, 0.255), (1, 9, 0.0)],
    )
    def test_floor_is_sqrt_2_ln_e_over_mu(self, num_experts, expected, floor):
        assert stats.max_violation_floor(num_experts, expected) == pytest.approx(floor, abs=1e-3)

    def test_floor_bounds_the_mean_max_violation_of_a_fair_router(self):
        rng = np.random.default_rng(0)
        for num_experts, expected in [(8, 64), (64, 64), (64, 256)]:
            draws = rng.multinomial(num_experts * expected, np.full(num_experts, 1 / num_experts), size=200)
            floor = stats.max_violation_floor(num_experts, expected)
            assert 0.6 * floor < float(np.mean(stats.max_violation(draws))) < floor

    def test_floor_without_tokens_is_infinite(self):
        assert stats.max_violation_floor(8, 0) == math.inf

    @pytest.mark.parametrize("as_array", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
    def test_without_tokens_the_load_counts_as_even(self, as_array):
        none = as_array(np.zeros(8, dtype=np.int64))
        assert stats.load_share(none).tolist() == [1 / 8] * 8
        assert float(stats.load_entropy(none)) == pytest.approx(1.0)
        assert float(stats.effective_experts(none)) == pytest.approx(8.0)
        for function in (stats.max_violation, stats.coefficient_of_variation, stats.gini):
            assert float(function(none)) == pytest.approx(0.0)
        assert float(stats.min_load(none)) == float(stats.straggler_factor(none)) == pytest.approx(1.0)
        assert float(stats.rank_straggler_factor(none, [0, 1] * 4, 2)) == pytest.approx(1.0)
        assert stats.token_share(none, 0).tolist() == [0.0] * 8
        assert not bool(stats.hot_experts(none).any())
        assert not bool(stats.cold_experts(none, min_expected=0).any())

    @pytest.mark.parametrize("as_array", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
    def test_one_expert_is_even(self, as_array):
        values = [f(as_array(np.array([7]))).item() for f in COUNT_STATISTICS]
        assert values == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]

    def test_one_for_all_is_the_far_end_of_each_range(self):
        one = np.array([0, 12, 0, 0])
        assert float(stats.load_entropy(one)) == 0.0
        assert float(stats.effective_experts(one)) == 1.0
        assert float(stats.max_violation(one)) == 3.0
        assert float(stats.coefficient_of_variation(one)) == pytest.approx(math.sqrt(3))
        assert float(stats.gini(one)) == pytest.approx(0.75)
        assert float(stats.min_load(one)) == 0.0
        assert float(stats.straggler_factor(one)) == 4.0
        assert float(stats.rank_straggler_factor(one, [0, 0, 1, 1], 2)) == 2.0

    @settings(deadline=None)
    @given(counts)
    def test_ranges(self, counts_E):
        num_experts, eps = len(counts_E), 1e-9
        assert float(np.sum(stats.load_share(counts_E))) == pytest.approx(1.0)
        assert -eps <= float(stats.load_entropy(counts_E)) <= 1 + eps
        assert 1 - eps <= float(stats.effective_experts(counts_E)) <= num_experts * (1 + eps)
        assert -eps <= float(stats.max_violation(counts_E)) <= num_experts - 1 + eps
        assert -eps <= float(stats.coefficient_of_variation(counts_E)) <= math.sqrt(num_experts - 1) + eps
        assert -eps <= float(stats.gini(counts_E)) <= 1 - 1 / num_experts + eps
        assert -eps <= float(stats.min_load(counts_E)) <= 1 + eps
        assert 1 - eps <= float(stats.straggler_factor(counts_E)) <= num_experts + eps
        ranks = np.arange(num_experts) % 3
        assert 1 - eps <= float(stats.rank_straggler_factor(counts_E, ranks, 3)) <= 3 + eps

    @settings(deadline=None)
    @given(counts, st.randoms(use_true_random=False), st.integers(2, 1000))
    def test_order_and_scale_do_not_matter(self, counts_E, random, factor):
        order = list(range(len(counts_E)))
        random.shuffle(order)
        for function in COUNT_STATISTICS[1:]:
            value = float(function(counts_E))
            assert float(function(counts_E[order])) == pytest.approx(value, abs=1e-9)
            assert float(function(counts_E * factor)) == pytest.approx(value, abs=1e-9)

    @settings(deadline=None)
    @given(counts)
    def test_torch_agrees_with_numpy(self, counts_E):
        for function in COUNT_STATISTICS:
            expected = np.asarray(function(counts_E))
            # integer counts become float32 in torch
            np.testing.assert_allclose(function(torch.as_tensor(counts_E)).numpy(), expected, rtol=1e-4, atol=1e-4)
            in_64 = function(torch.as_tensor(counts_E, dtype=torch.float64))
            np.testing.assert_allclose(in_64.numpy(), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("function", COUNT_STATISTICS)
    def test_layers_may_be_stacked(self, function):
        stacked = np.array([[3, 4, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
        np.testing.assert_allclose(function(stacked), [np.asarray(function(row)) for row in stacked])

    def test_no_experts_is_refused(self):
        with pytest.raises(ValueError, match=r"counts_E: expected one entry per expert .* got shape \(0,\)"):
            stats.load_share(np.zeros(0, dtype=np.int64))


@pytest.mark.parametrize("as_array", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
class TestHotAndCold:
    def test_hot_is_above_the_capacity(self, as_array):
        # 8 assignments on 4 experts, fair 2: capacity ceil(1.25 * 2) = 3, so 4 is above it and 3 is not
        assert stats.hot_experts(as_array(COUNTS_E)).tolist() == [False, True, False, False]
        assert stats.hot_experts(as_array(COUNTS_E), 1.0).tolist() == [True, True, False, False]

    def test_hot_follows_the_layers_own_capacity(self, as_array):
        for factor in (0.5, 1.0, 1.1, 1.25, 1.3, 2.0):
            for total in range(1, 60):
                for num_experts in (1, 2, 3, 7, 10):
                    limit = Capacity(factor).limit(10**9, total, num_experts)
                    counts_E = np.zeros(num_experts, dtype=np.int64)
                    counts_E[0] = total
                    assert bool(stats.hot_experts(as_array(counts_E), factor)[0]) == (total > limit), (factor, total)

    def test_cold_needs_low_load_and_enough_evidence(self, as_array):
        enough = np.array([0, 9, 10, 156, 156, 156, 156, 157])  # 8 experts, 800 assignments: 100 expected each
        assert stats.cold_experts(as_array(enough)).tolist() == [True, True] + [False] * 6
        too_few = np.array([0, 0, 10, 156, 156, 156, 156, 157])  # 98.9 expected
        assert not bool(stats.cold_experts(as_array(too_few)).any())
        assert stats.cold_experts(as_array(too_few), min_expected=0).tolist() == [True, True] + [False] * 6

    def test_layers_may_be_stacked(self, as_array):
        stacked = as_array(np.array([[400, 0], [200, 200]]))
        assert stats.hot_experts(stacked).tolist() == [[True, False], [False, False]]
        assert stats.cold_experts(stacked).tolist() == [[False, True], [False, False]]
        assert stats.token_share(stacked, 200).tolist() == [[2.0, 0.0], [1.0, 1.0]]
        assert stats.rank_straggler_factor(stacked, [0, 1], 2).tolist() == [2.0, 1.0]


def test_the_gate_is_what_keeps_a_fair_router_from_looking_cold():
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((200 * 32, 256)), axis=1)[:, :8].reshape(200, -1)  # 200 windows of 32 tokens, K = 8
    counts = np.stack([np.bincount(window, minlength=256) for window in ids])
    assert float(stats.cold_experts(counts, min_expected=0).mean()) == pytest.approx(0.36, abs=0.01)
    assert not stats.cold_experts(counts).any()


def test_shares_of_tokens_sum_to_k():
    assert stats.token_share(COUNTS_E, 4).tolist() == [0.75, 1.0, 0.25, 0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.hot_experts(COUNTS_E, 0.0), r"capacity_factor: expected more than 0, got 0.0"),
        (lambda: stats.rank_straggler_factor(COUNTS_E, [0, 1], 2), r"one rank for each of 4 experts, got shape \(2,\)"),
        (
            lambda: stats.rank_straggler_factor(COUNTS_E, [0, 1, 2, 0], 2),
            r"ranks in \[0, 2\), got 0 to 2; raise num_ra",
        ),
        (lambda: stats.rank_straggler_factor(COUNTS_E, [0, 1, -1, 0], 2), r"ranks in \[0, 2\), got -1 to 1"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class TestProbabilitiesAndLogits:
    def test_certain_tokens_have_no_entropy_and_all_the_information(self):
        probs_TE = np.eye(4)
        assert float(stats.token_entropy(probs_TE)) == 0.0  # 0 ln 0 = 0
        assert float(stats.mutual_information(probs_TE)) == pytest.approx(math.log(4))

    def test_collapse_has_neither_entropy_nor_information(self):
        probs_TE = np.tile([0.0, 1.0, 0.0], (5, 1))
        assert float(stats.marginal_entropy(probs_TE)) == float(stats.mutual_information(probs_TE)) == 0.0

    @pytest.mark.parametrize("as_array", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
    def test_without_tokens_the_router_counts_as_undecided(self, as_array):
        none = as_array(np.zeros((0, 8)))
        assert float(stats.marginal_entropy(none)) == float(stats.token_entropy(none)) == pytest.approx(math.log(8))
        assert float(stats.mutual_information(none)) == 0.0
        assert [float(value) for value in stats.logit_moments(none)] == [0.0, 0.0, 0.0]

    def test_large_logits_do_not_overflow(self):
        assert float(stats.logit_moments(np.full((2, 4), 1e4)).logsumexp) == pytest.approx(1e4 + math.log(4))

    @settings(deadline=None, max_examples=50)
    @given(st.integers(1, 20), st.integers(1, 16), st.integers(0, 2**31))
    def test_ranges_and_parity(self, num_tokens, num_experts, seed):
        logits_TE = np.random.default_rng(seed).normal(0, 5, (num_tokens, num_experts))
        probs_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(1, keepdims=True)
        top = math.log(num_experts) + 1e-9
        for function in (stats.marginal_entropy, stats.token_entropy, stats.mutual_information):
            value = float(function(probs_TE))
            assert -1e-9 <= value <= top  # the information is never negative: entropy is concave
            assert float(function(torch.as_tensor(probs_TE))) == pytest.approx(value, abs=1e-12)
        for ours, theirs in zip(
            stats.logit_moments(torch.as_tensor(logits_TE)), stats.logit_moments(logits_TE), strict=True
        ):
            assert float(ours) == pytest.approx(float(theirs), abs=1e-12)

    @pytest.mark.parametrize("function", [stats.marginal_entropy, stats.token_entropy, stats.logit_moments])
    def test_batches_must_be_flattened(self, function):
        with pytest.raises(ValueError, match=r"expected shape \(T, E\), got \(2, 3, 4\); flatten"):
            function(np.zeros((2, 3, 4)))


class TestRoutingStats:
    def test_golden(self):
        record = routing_stats("blocks.0.moe", 50, sums_of(LOGITS_TE, COUNTS_E, dropped={"capacity": 2, "tokens": 1}))
        assert (record.layer, record.step, record.num_tokens) == ("blocks.0.moe", 50, 4)
        assert record.dropped == {"capacity": 2, "tokens": 1}
        assert record.max_violation == 1.0
        assert record.max_token_share == 1.0  # expert 1 is in the top-2 of all four tokens
        assert record.load_entropy == pytest.approx(0.70282, abs=1e-5)
        assert record.marginal_entropy == pytest.approx(1.117803 / math.log(4), abs=1e-6)
        assert record.token_entropy == pytest.approx(0.914616 / math.log(4), abs=1e-6)
        assert record.mutual_information == pytest.approx(0.203187, abs=1e-6)
        assert record.logit_mean == pytest.approx(LOGITS_TE.mean())
        assert record.logit_std == pytest.approx(LOGITS_TE.std())
        assert record.logit_logsumexp == pytest.approx(np.log(np.exp(LOGITS_TE).sum(1)).mean())
        assert record.load_cv == pytest.approx(0.790569, abs=1e-6)
        assert record.gini == pytest.approx(0.4375)
        assert record.min_load == 0.0
        assert record.dead_experts == ()  # expert 3 got nothing, but only 2 assignments were to be expected

    def test_losses_are_means_over_tokens(self):
        a = sums_of(LOGITS_TE[:1], [1, 1, 0, 0], losses={"switch": 1 * 4.0})  # one token at 4.0
        b = sums_of(LOGITS_TE[1:], [2, 3, 1, 0], losses={"switch": 3 * 2.0})  # three tokens at 2.0
        assert routing_stats("l", 1, merge(a, b)).losses == {"switch": pytest.approx(2.5)}

    def test_merged_windows_are_one_window(self):
        a = sums_of(LOGITS_TE[:1], [1, 1, 0, 0], dropped={"capacity": 1})
        b = sums_of(LOGITS_TE[1:], [2, 3, 1, 0], dropped={"capacity": 2, "tokens": 1})
        merged, whole = routing_stats("l", 1, merge(a, b)), routing_stats("l", 1, sums_of(LOGITS_TE, COUNTS_E))
        assert merged.counts_E.tolist() == whole.counts_E.tolist() == COUNTS_E.tolist()
        assert merged.dropped == {"capacity": 3, "tokens": 1}
        for name in ("token_entropy", "marginal_entropy", "logit_mean", "logit_std", "logit_logsumexp"):
            assert getattr(merged, name) == pytest.approx(getattr(whole, name)), name

    def test_different_layers_do_not_merge(self):
        with pytest.raises(ValueError, match="windows of 4 and 3 experts; merge sums of the same layer only"):
            merge(sums_of(LOGITS_TE, COUNTS_E), sums_of(LOGITS_TE[:, :3], [1, 2, 1]))

    def test_dead_needs_both_low_load_and_enough_evidence(self):
        # 8 experts, 800 assignments: 100 expected each, dead below 10
        assert stats.dead_experts(np.array([0, 9, 10, 156, 156, 156, 156, 157])) == (0, 1)
        assert stats.dead_experts(np.array([0, 0, 10, 156, 156, 156, 156, 157])) == ()  # 98.9 expected

    def test_without_tokens_nothing_looks_collapsed(self):
        empty = RoutingSums(0, np.zeros(4, dtype=np.int64), np.zeros(4), 0.0, 0.0, 0.0, 0.0, {}, {"switch": 0.0})
        record = routing_stats("l", 1, empty)
        assert (record.load_entropy, record.token_entropy, record.marginal_entropy) == pytest.approx((1.0, 1.0, 1.0))
        assert (record.max_violation, record.max_token_share, record.mutual_information) == (0.0, 0.0, 0.0)
        assert record.effective_experts == pytest.approx(4.0)
        assert record.losses == {"switch": 0.0}

    def test_one_expert(self):
        record = routing_stats("l", 1, sums_of(np.array([[1.0], [2.0]]), [2]))
        assert (record.load_entropy, record.token_entropy, record.marginal_entropy) == (1.0, 1.0, 1.0)
        assert (record.max_token_share, record.effective_experts) == (1.0, 1.0)

    def test_diverged_logits_stay_visible(self):
        sums = RoutingSums(
            1, np.array([1, 0]), np.array([math.nan] * 2), math.nan, math.nan, math.nan, math.nan, {}, {}
        )
        record = routing_stats("l", 1, sums)
        assert math.isnan(record.logit_std)
        assert math.isnan(record.token_entropy)
        assert record.max_violation == 1.0  # counts are integers: they still hold

    def test_a_record_from_before_the_newest_fields_loads(self, tmp_path):
        record = routing_stats("l", 1, sums_of(LOGITS_TE, COUNTS_E))
        with RunStore(tmp_path) as store:
            store.routing([record])
        with closing(sqlite3.connect(store.path)) as db, db:
            (text,) = db.execute("SELECT stats FROM routing").fetchone()
            old = {key: value for key, value in json.loads(text).items() if key not in {"load_cv", "gini", "min_load"}}
            db.execute("UPDATE routing SET stats = ?", (json.dumps(old),))
        with RunStore.open_readonly(tmp_path) as store:
            (loaded,) = store.latest_routing()
        assert all(math.isnan(value) for value in (loaded.load_cv, loaded.gini, loaded.min_load))
        assert loaded.max_violation == record.max_violation
        assert loaded.counts_E.tolist() == COUNTS_E.tolist()


@given(st.lists(st.tuples(st.sampled_from([1, 4, 7]), st.integers(0, 3000), st.integers(0, 2**31)), max_size=6))
def test_all_layers_at_once_are_each_by_itself(layers):
    """Of several sizes, some without tokens, in their order."""
    sums = {}
    for number, (num_experts, num_tokens, seed) in enumerate(layers):
        rng = np.random.default_rng(seed)
        share_E = rng.dirichlet(np.ones(num_experts))
        sums[f"layers.{number}"] = RoutingSums(
            num_tokens, rng.multinomial(num_tokens, share_E), num_tokens * share_E, 0.3 * num_tokens,
            1.5 * num_tokens, 9.0 * num_tokens * num_experts, 2.0 * num_tokens, {"tokens": number}, {"z": 1.0},
        )  # fmt: skip
    together = stats.all_routing_stats(9, sums)
    assert [each.layer for each in together] == list(sums)
    for each in together:
        alone = routing_stats(each.layer, 9, sums[each.layer])
        assert each.counts_E.tolist() == alone.counts_E.tolist()
        for name in (name for name in vars(alone) if name != "counts_E"):
            assert getattr(each, name) == pytest.approx(getattr(alone, name)), name
            assert type(getattr(each, name)) is type(getattr(alone, name)), name
