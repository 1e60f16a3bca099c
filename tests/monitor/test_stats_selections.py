"""Selections: numbers worked out by hand, a brute-force count for each statistic, and the same answer from torch."""

import math

import numpy as np
import pytest
import torch

from equipoise.monitor import stats_selections as selections

EARLY_TK = np.array([[0, 1], [0, 1], [2, 3], [1, 0]])
LATE_TK = np.array([[0, 1], [0, 2], [0, 1], [0, 1]])  # 2, 1, 0 and 2 experts in common, whatever their order

as_array = pytest.mark.parametrize("as_array", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])


def random_ids(num_tokens, num_experts, k, seed=0):
    return np.argsort(np.random.default_rng(seed).random((num_tokens, num_experts)), axis=1)[:, :k]


@as_array
class TestBeforeAndAfter:
    def test_golden(self, as_array):
        early, late = as_array(EARLY_TK), as_array(LATE_TK)
        assert float(selections.router_saturation(early, late)) == pytest.approx((2 + 1 + 0 + 2) / 8)
        assert float(selections.routing_agreement(early, late)) == pytest.approx((1 + 1 / 3 + 0 + 1) / 4)

    def test_the_same_routing_agrees(self, as_array):
        ids = random_ids(50, 8, 3)
        for function in (selections.router_saturation, selections.routing_agreement):
            assert float(function(as_array(ids), as_array(ids[:, ::-1].copy()))) == 1.0

    def test_different_k_may_be_compared(self, as_array):
        one, other = as_array(np.array([[0, 1, 2]])), as_array(np.array([[2]]))
        assert float(selections.routing_agreement(one, other)) == pytest.approx(1 / 3)

    def test_without_tokens_nothing_has_changed(self, as_array):
        none = as_array(np.zeros((0, 2), dtype=np.int64))
        assert float(selections.router_saturation(none, none)) == 1.0
        assert float(selections.routing_agreement(none, none)) == 1.0


@pytest.mark.parametrize(("num_experts", "k"), [(8, 2), (16, 4), (4, 4), (64, 1)])
def test_chance_is_k_over_e_and_the_hypergeometric_mean(num_experts, k):
    one, other = random_ids(20_000, num_experts, k, 1), random_ids(20_000, num_experts, k, 2)
    noise = 4 * 0.5 / math.sqrt(20_000)  # four standard errors of something in [0, 1]
    assert float(selections.router_saturation(one, other)) == pytest.approx(k / num_experts, abs=noise)
    chance = selections.chance_agreement(num_experts, k)
    assert float(selections.routing_agreement(one, other)) == pytest.approx(chance, abs=noise)


def test_chance_agreement_by_hand():
    assert selections.chance_agreement(4, 4) == 1.0
    assert selections.chance_agreement(4, 1) == pytest.approx(1 / 4)
    # two of four: the other pair is the same in 1 of 6 ways, shares one in 4 (1/3 each), none in 1
    assert selections.chance_agreement(4, 2) == pytest.approx((1 + 4 / 3) / 6)


@as_array
class TestTogether:
    def test_golden(self, as_array):
        # 0 is in all four, 1 in three of them, 2 in one
        expected = [[1, 3 / 4, 1 / 4, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
        np.testing.assert_allclose(np.asarray(selections.co_selection(as_array(LATE_TK), 4)), expected, rtol=1e-6)

    def test_brute_force(self, as_array):
        ids = random_ids(300, 12, 3)
        expected = np.zeros((12, 12))
        for i in range(12):
            with_i = [row for row in ids if i in row]
            for j in range(12):
                expected[i, j] = sum(j in row for row in with_i) / len(with_i)
        found = np.asarray(selections.co_selection(as_array(ids), 12))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        fair = (3 - 1) / (12 - 1)
        assert found[~np.eye(12, dtype=bool)].mean() == pytest.approx(fair, rel=0.05)

    def test_lift_golden(self, as_array):
        # 100, 60 and 40 tokens; pairs 50, 30, 10: P = 180; products 6000, 4000, 2400, twice each: 24800
        counts = np.array([[100, 50, 30], [50, 60, 10], [30, 10, 40]])
        lift = np.asarray(selections.co_selection_lift(as_array(counts)))
        chance = np.array([6000, 4000, 2400]) * 180 / 24800
        assert [lift[0, 1], lift[0, 2], lift[1, 2]] == pytest.approx(list(np.array([50, 30, 10]) / chance))
        assert np.isnan(np.diagonal(lift)).all()
        np.testing.assert_array_equal(lift, lift.T)

    def test_lift_of_a_fair_router_is_one_whatever_k_is(self, as_array):
        for k in (2, 3, 8):
            ids = random_ids(20_000, 16, k)
            counts = np.zeros((16, 16), dtype=np.int64)
            for a in range(k):
                for b in range(k):
                    np.add.at(counts, (ids[:, a], ids[:, b]), 1)
            lift = np.asarray(selections.co_selection_lift(as_array(counts)))
            beside = lift[~np.eye(16, dtype=bool)]
            assert beside.mean() == pytest.approx(1.0, rel=0.02)
            assert beside.std() < 0.1

    def test_too_few_tokens_have_no_lift(self, as_array):
        for counts in (np.zeros((3, 3), dtype=np.int64), np.diag([50, 50, 50]), np.full((3, 3), 4)):
            assert np.isnan(np.asarray(selections.co_selection_lift(as_array(counts)))).all()

    def test_without_tokens_there_is_nothing(self, as_array):
        assert not np.asarray(selections.co_selection(as_array(np.zeros((0, 2), dtype=np.int64)), 3)).any()


@as_array
class TestForWhom:
    def test_domains_golden(self, as_array):
        shares = selections.domain_specialisation(as_array(LATE_TK), as_array(np.array([0, 0, 0, 2])), 4, 3)
        expected = [[1, 2 / 3, 1 / 3, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
        np.testing.assert_allclose(np.asarray(shares), expected, rtol=1e-6)

    def test_domains_brute_force_and_chance(self, as_array):
        ids, domains = random_ids(4000, 8, 2), np.arange(4000) % 2
        shares = np.asarray(selections.domain_specialisation(as_array(ids), as_array(domains), 8, 2))
        for d in range(2):
            for e in range(8):
                assert shares[d, e] == pytest.approx(np.mean([e in row for row in ids[domains == d]]), rel=1e-6)
        np.testing.assert_allclose(shares.sum(1), 2.0, rtol=1e-6)
        np.testing.assert_allclose(shares, 2 / 8, atol=0.05)

    def test_vocabulary_golden(self, as_array):
        found = selections.vocabulary_specialisation(as_array(LATE_TK), as_array(np.array([50256, 7, 7, 50256])), 3)
        assert found.token_ids_U.tolist() == [7, 50256]
        assert found.counts_U.tolist() == [2, 2]
        np.testing.assert_allclose(np.asarray(found.share_UE), [[1, 0.5, 0.5], [1, 1, 0]], rtol=1e-6)

    def test_vocabulary_brute_force_without_rare_entries(self, as_array):
        ids, entries = random_ids(500, 8, 2), np.random.default_rng(1).zipf(1.7, 500)
        found = selections.vocabulary_specialisation(as_array(ids), as_array(entries), 8, min_count=5)
        common = [x for x in np.unique(entries) if (entries == x).sum() >= 5]
        assert found.token_ids_U.tolist() == common
        assert len(common) < len(np.unique(entries))
        for row, x in enumerate(common):
            expected = [np.mean([e in row for row in ids[entries == x]]) for e in range(8)]
            np.testing.assert_allclose(np.asarray(found.share_UE)[row], expected, rtol=1e-6)
            assert int(found.counts_U[row]) == (entries == x).sum()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: selections.router_saturation(EARLY_TK, LATE_TK[:3]), r"late_TK: .* \(4, 2\), got \(3, 2\); route the"),
        (lambda: selections.routing_agreement(EARLY_TK, LATE_TK[:3]), r"other_Tk: expected 4 tokens, .* got 3"),
        (lambda: selections.routing_agreement(EARLY_TK[0], LATE_TK), r"one_TK: expected shape \(T, K\), got \(2,\)"),
        (lambda: selections.chance_agreement(4, 5), r"k: expected 1 to 4, the number of experts, got 5"),
        (lambda: selections.co_selection(EARLY_TK, 3), r"ids_TK: expected values in \[0, 3\), got 0 to 3; take pad"),
        (lambda: selections.co_selection(EARLY_TK - 1, 4), r"in \[0, 4\), got -1 to 2"),
        (lambda: selections.co_selection(EARLY_TK[None], 4), r"ids_TK: expected shape \(T, K\), got \(1, 4, 2\)"),
        (
            lambda: selections.domain_specialisation(EARLY_TK, np.array([0, 1]), 4, 2),
            r"domains_T: expected one entry for each of 4 tokens, got \(2,\)",
        ),
        (
            lambda: selections.domain_specialisation(EARLY_TK, np.array([0, 1, 2, 0]), 4, 2),
            r"domains_T: expected values in \[0, 2\), got 0 to 2; .*num_domains",
        ),
        (lambda: selections.vocabulary_specialisation(EARLY_TK, np.zeros(3, int), 4), r"token_ids_T: expected one"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
