"""Near ties, biases and drift: numbers by hand, what chance does by simulation, and the same answer from torch."""

import math

import numpy as np
import pytest
import torch

from equipoise.monitor import stats_drift as drift

LOGITS_TE = np.array([[2, 1, 0, -1], [1.5, 1.4, -0.5, 0.2], [3, 0.5, 0.4, 0.3], [0, 2, 1, -2]], dtype=np.float64)

as_array = pytest.mark.parametrize("as_array", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])


@as_array
class TestNearTies:
    def test_golden(self, as_array):
        # 1.5 and 1.4 are 0.1 apart, 6.7 % of the larger; the others 50 % and more
        assert float(drift.fragile_share(as_array(LOGITS_TE), 1)) == 0.0
        assert float(drift.fragile_share(as_array(LOGITS_TE), 1, eps=0.07)) == 0.25
        near = as_array(np.array([[1.0, 1.0 + 2**-8, 0.0], [1.0, 1.0 + 2**-6, 0.0]]))
        assert float(drift.fragile_share(near, 1)) == 0.5
        assert float(drift.fragile_share(near, 1, eps=2**-10)) == 0.0

    def test_none_without_tokens(self, as_array):
        assert float(drift.fragile_share(as_array(np.zeros((0, 4))), 2)) == 0.0


def test_fragile_tokens_are_those_whose_choice_bfloat16_can_change():
    scores = torch.randn(4096, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rounded = scores.bfloat16().double()
    changed = (scores.topk(4).indices.sort().values != rounded.topk(4).indices.sort().values).any(1)
    fragile = torch.tensor([bool(drift.fragile_share(row[None], 4)) for row in scores])
    assert changed.any()
    assert not (changed & ~fragile).any()
    assert fragile.double().mean() == drift.fragile_share(scores, 4)


@as_array
class TestBias:
    def test_golden(self, as_array):
        scores = as_array(np.array([[0.0, 1.0], [0.0, 3.0]]))  # spread within the tokens: 0.5 and 1.5
        found = drift.bias_health(as_array(np.array([2.0, 0.0])), scores, 1)
        assert float(found.std) == 1.0
        assert float(found.max_abs) == 2.0
        assert float(found.ratio) == pytest.approx(1 / math.sqrt((0.25 + 2.25) / 2))
        assert float(found.changed_share) == 0.5  # 2 beats 1 and not 3

    def test_a_constant_bias_does_nothing(self, as_array):
        found = drift.bias_health(as_array(np.full(4, 5.0)), as_array(LOGITS_TE), 2)
        assert [float(value) for value in found] == [0.0, 5.0, 0.0, 0.0]

    def test_what_all_experts_of_a_token_share_is_no_spread(self, as_array):
        bias, shift = as_array(np.array([0.1, 0, 0, -0.1])), np.array([[0.0], [50.0], [-50.0], [9.0]])
        one = drift.bias_health(bias, as_array(LOGITS_TE), 2)
        other = drift.bias_health(bias, as_array(LOGITS_TE + shift), 2)
        assert [float(value) for value in one] == pytest.approx([float(value) for value in other])

    def test_against_topk(self, as_array):
        rng = np.random.default_rng(0)
        scores, bias = rng.random((500, 16)), rng.normal(0, 0.05, 16)
        before = torch.as_tensor(scores).topk(4).indices.sort().values
        after = torch.as_tensor(scores + bias).topk(4).indices.sort().values
        changed = (before != after).any(1).double().mean().item()
        assert 0.1 < changed < 0.9
        found = drift.bias_health(as_array(bias), as_array(scores), 4)
        assert float(found.changed_share) == pytest.approx(changed)

    def test_the_ends(self, as_array):
        same, bias = as_array(np.ones((3, 2))), as_array(np.array([1.0, 0.0]))
        assert float(drift.bias_health(bias, same, 1).ratio) == math.inf
        assert float(drift.bias_health(bias * 0, same, 1).ratio) == 0.0
        none = drift.bias_health(bias, as_array(np.zeros((0, 2))), 1)
        assert (float(none.ratio), float(none.changed_share)) == (0.0, 0.0)


@as_array
class TestLoadDrift:
    def test_golden(self, as_array):
        counts, baseline = as_array(np.array([3, 1])), as_array(np.array([2, 2]))
        # f = 3/4, 1/4 and g = 1/2, 1/2: PSI = 1/4 ln 1.5 - 1/4 ln 0.5
        psi = float(drift.population_stability_index(counts, baseline, 0.0))
        assert psi == pytest.approx(0.25 * math.log(3))
        assert psi == pytest.approx(float(drift.population_stability_index(baseline, counts, 0.0)))

    def test_the_same_load_has_not_drifted(self, as_array):
        counts = as_array(np.array([30, 40, 10, 0]))
        assert float(drift.population_stability_index(counts, counts)) == 0.0

    def test_a_dead_expert_is_finite_and_layers_may_be_stacked(self, as_array):
        counts = as_array(np.array([[100, 100, 100, 100], [200, 200, 0, 0]]))
        psi = drift.population_stability_index(counts, counts[0])
        assert psi.shape == (2,)
        assert float(psi[0]) == 0.0
        assert 1.0 < float(psi[1]) < math.inf

    def test_it_is_both_divergences(self, as_array):
        rng = np.random.default_rng(0)
        a, b = rng.integers(0, 100, 16), rng.integers(0, 100, 16)
        f, g = ((counts + 0.5) / (counts + 0.5).sum() for counts in (a, b))
        both = (f * np.log(f / g)).sum() + (g * np.log(g / f)).sum()
        assert float(drift.population_stability_index(as_array(a), as_array(b))) == pytest.approx(both, rel=1e-4)


@pytest.mark.parametrize(
    ("degrees", "quantile", "chi2"),  # from tables of the chi^2 distribution
    [(3, 0.95, 7.815), (7, 0.99, 18.475), (63, 0.99, 92.010), (255, 0.99, 310.457), (7, 0.5, 6.346)],
)
def test_the_floor_is_a_quantile_of_chi_squared(degrees, quantile, chi2):
    assert drift.drift_floor(degrees + 1, 2.0, 2.0, quantile) == pytest.approx(chi2, rel=0.01)


@pytest.mark.parametrize("num_experts", [8, 64])
def test_two_windows_of_one_router_stay_below_the_floor_as_often_as_it_says(num_experts):
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(num_experts, 20.0))
    windows, baselines = rng.multinomial(8000, share, 4000), rng.multinomial(24000, share, 4000)
    psi = drift.population_stability_index(windows, baselines)
    for quantile in (0.5, 0.9, 0.99):
        floor = drift.drift_floor(num_experts, 8000, 24000, quantile)
        assert float(np.mean(psi < floor)) == pytest.approx(quantile, abs=0.03)


def test_the_floor_at_its_ends():
    assert drift.drift_floor(8, 0, 100) == math.inf
    assert drift.drift_floor(1, 10, 10) == 0.0
    with pytest.raises(ValueError, match=r"quantile: expected a probability between 0 and 1, got 1.0"):
        drift.drift_floor(8, 10, 10, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: drift.fragile_share(LOGITS_TE, 4), r"k: expected at least 1 and less than 4, .* got 4"),
        (lambda: drift.fragile_share(LOGITS_TE, 0), r"k: expected at least 1 and less than 4, .* got 0"),
        (lambda: drift.fragile_share(np.zeros((2, 3, 4)), 1), r"expected shape \(T, E\), got \(2, 3, 4\); flatten"),
        (lambda: drift.bias_health(np.zeros(3), LOGITS_TE, 2), r"bias_E: expected shape \(4,\), got \(3,\)"),
        (lambda: drift.bias_health(np.zeros(4), LOGITS_TE, 5), r"k: expected 1 to 4, the number of experts, got 5"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
