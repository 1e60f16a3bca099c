"""What may be planned on: counted rightly, and refused with the reason."""

import numpy as np
import pytest

from equipoise.plan import Traffic, traffic_of_ids
from equipoise.plan.drift import drift_covariance
from equipoise.plan.traffic import pairs_of_ids

IDS = np.array([[0, 1], [1, 2], [2, -1], [1, 0]])


def test_windows_and_pairs_are_counted():
    traffic = traffic_of_ids("moe", IDS, 4, num_windows=2)
    assert traffic.load_WE.tolist() == [[1, 2, 1, 0], [1, 1, 1, 0]]
    assert traffic.pairs_EE.tolist() == [[2, 2, 0, 0], [2, 3, 1, 0], [0, 1, 2, 0], [0, 0, 0, 0]]
    assert traffic.num_pair_tokens == 4
    assert [part.tolist() for part in traffic.windows] == [IDS[:2].tolist(), IDS[2:].tolist()]


def test_pairs_across_layers_need_not_have_as_many_experts():
    assert pairs_of_ids(IDS, 3, IDS[:, :1], 4).tolist() == [[1, 1, 0, 0], [1, 2, 0, 0], [0, 1, 1, 0]]


@pytest.mark.parametrize(
    ("ids", "num_windows", "message"),
    [
        (IDS[0], 1, r"layer moe: expected expert ids as integers of shape \(tokens, k\), got int64 of shape \(2,\)"),
        (IDS * 0.5, 1, r"expected expert ids as integers .* got float64"),
        (IDS, 5, r"expected at least one token in each of 5 windows, got 4 tokens; record more"),
        (IDS + 2, 1, r"expected expert ids from 0 to 3, or -1 for none, got 1 to 4; check the number of experts"),
        (IDS - 1, 1, r"expected expert ids from 0 to 3, or -1 for none, got -2 to 1"),
        (np.array([[1, 1]]), 1, r"expected different experts for each token, 1 tokens name one twice"),
        (np.array([[1, 0], [-1, -1]]), 2, r"expected assignments in every window, got none in \[1\]; leave those"),
    ],
)
def test_choices_that_make_no_sense_are_refused(ids, num_windows, message):
    with pytest.raises(ValueError, match=message):
        traffic_of_ids("moe", ids, 4, num_windows)


LOAD = np.array([[4, 2], [1, 1]])


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (LOAD[0], r"expected load as whole numbers of shape \(windows, experts\), got int64 of shape \(2,\)"),
        (LOAD * 1.0, r"expected load as whole numbers .* got float64"),
        (LOAD[:0], r"expected load as whole numbers .* shape \(0, 2\)"),
        (LOAD - 2, r"expected counts of 0 and more, got -1 for expert 0 in window 1; the record is damaged"),
        (LOAD * [[1], [0]], r"expected assignments in every window, got none in \[1\]"),
    ],
)
def test_counts_that_make_no_sense_are_refused(load, message):
    with pytest.raises(ValueError, match=message):
        Traffic("moe", load)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (np.ones((3, 3), int), r"expected pairs of 2 x 2 experts, got shape \(3, 3\)"),
        (np.array([[1, 2], [0, 1]]), r"expected pairs that are symmetric and 0 or more"),
        (np.array([[1, -1], [-1, 1]]), r"expected pairs that are symmetric and 0 or more"),
        (np.array([[9, 0], [0, 1]]), r"expected pairs of at most 5 tokens, got 9"),
    ],
)
def test_pairs_that_make_no_sense_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        Traffic("moe", LOAD, pairs, 5)


# ------------------------------------------------------------------------------------------------------------- drift


def blocks(share_by_window):
    """Two blocks of 12 experts that never mix; so many of 1000 tokens take the first in each window."""
    rng = np.random.default_rng(0)
    first_T = np.concatenate([np.arange(1000) < 1000 * share for share in share_by_window])
    ids_TK = np.array([rng.permutation(12)[:2] for _ in first_T]) + 12 * ~first_T[:, None]
    return traffic_of_ids("moe", ids_TK, 24, len(share_by_window))


def covariance(traffic):
    return drift_covariance(traffic.load_WE, traffic.pairs_EE, traffic.num_pair_tokens)


def test_experts_that_fire_together_drift_together_as_far_as_windows_wander():
    drift_EE = covariance(blocks((0.6, 0.4) * 4))
    first, second = np.repeat([1, 0], 12), np.repeat([0, 1], 12)
    assert np.corrcoef(drift_EE[0], first)[0, 1] > 0.85
    assert first @ drift_EE @ second < 0  # what one gains the other loses
    # a block's share of the load is 0.5 +- 0.1: its variance over the windows is 8 / 7 of 0.01
    assert first @ drift_EE @ first == pytest.approx(0.01 * 8 / 7, rel=0.25)
    assert np.linalg.eigvalsh(drift_EE).min() > -1e-12


def test_windows_that_differ_by_chance_alone_do_not_drift():
    rng = np.random.default_rng(1)
    steady = blocks(rng.binomial(1000, 0.5, size=64) / 1000)
    first = np.repeat([1, 0], 12)
    assert first @ covariance(steady) @ first < 0.01 * 0.05  # what 0.6, 0.4, ... has, and much less


@pytest.mark.parametrize(
    "traffic",
    [
        Traffic("moe", LOAD),
        traffic_of_ids("moe", IDS, 4, 1),
        Traffic("moe", np.full((3, 2), 9), np.array([[15, 9], [9, 12]]), 20),
    ],
    ids=["no pairs", "one window", "windows alike"],
)
def test_where_nothing_is_known_nothing_drifts(traffic):
    assert not covariance(traffic).any()
