"""Matching ranks to places: at least half of the optimum, and nodes stay together."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from equipoise.plan.labels import matched, renamed


@pytest.mark.parametrize("seed", range(20))
def test_a_matching_is_near_the_optimum(seed):
    rng = np.random.default_rng(seed)
    gain = rng.random((8, 8)) ** 3
    item_P = matched(gain)
    assert sorted(item_P) == list(range(8))
    best = gain[linear_sum_assignment(gain, maximize=True)].sum()
    assert 0.85 * best <= gain[np.arange(8), item_P].sum() <= best + 1e-12


def test_a_hidden_order_is_found():
    order = np.random.default_rng(0).permutation(6)
    assert matched(np.eye(6)[np.argsort(order)]).tolist() == np.argsort(order).tolist()


def test_no_gain_anywhere_is_a_matching_too():
    assert sorted(matched(np.zeros((3, 3)))) == [0, 1, 2]


def test_ranks_of_a_node_stay_together():
    gain = np.random.default_rng(1).random((6, 6))
    nodes = renamed(gain, num_nodes=3).reshape(3, 2) // 2
    assert (nodes[:, 0] == nodes[:, 1]).all()
    assert sorted(nodes[:, 0]) == [0, 1, 2]
