"""Scores, on cases worked out by hand; and estimates from pairs against what counting gives."""

import numpy as np
import pytest

from equipoise.plan import Traffic, eplb_placement, num_moved, ranks_of_choices, score_layers, traffic_of_ids
from equipoise.plan.placement import holdings
from equipoise.plan.rank_load import even_parts, fixed_parts, rank_loads
from equipoise.plan.replicas import homes
from equipoise.types import Placement


def test_a_layer_by_hand():
    # ranks: {0, 1}, {2, 3}; nodes of one rank. Loads of the windows: (3, 1), (1, 3).
    ids_TK = np.array([[0, 1], [0, 2], [2, 3], [3, 1]])
    [score] = score_layers({"moe": Placement.even(4, 2)}, [traffic_of_ids("moe", ids_TK, 4, 2)], num_nodes=2)
    assert score.balance == 3 / 2
    assert score.fan_out == score.node_fan_out == (1 + 2 + 1 + 2) / 4
    assert (score.rank_hops, score.node_hops, score.moved) == (None, None, None)


def test_hops_by_hand():
    # 4 ranks of one expert, 2 nodes. Token 0: 0 -> 0 stays. 1: 0 -> 1 stays on the node. 2: 0 -> 3 leaves. 3: 2 -> 3.
    first, second = np.array([[0], [0], [0], [2]]), np.array([[0], [1], [3], [3]])
    layers = [traffic_of_ids(name, ids, 4, 1) for name, ids in (("a", first), ("b", second))]
    placements = dict.fromkeys("ab", Placement.even(4, 4))
    a, b = score_layers(placements, layers, num_nodes=2)
    assert a.rank_hops is None
    assert (b.rank_hops, b.node_hops) == (1 / 4, 3 / 4)


def test_tokens_without_an_expert_need_no_rank():
    [score] = score_layers({"moe": Placement.even(2, 2)}, [traffic_of_ids("moe", np.array([[0], [-1]]), 2, 1)])
    assert (score.fan_out, score.balance) == (1, 2)


def test_from_counts_the_load_is_shared_evenly_and_the_fan_out_is_unknown():
    placement = Placement(((0, 1), (0, 2)))
    [score] = score_layers({"moe": placement}, [Traffic("moe", np.array([[4, 1, 3]]))])
    assert score.balance == (2 + 3) / 4
    assert score.fan_out is None


def test_from_pairs_the_fan_out_is_a_lower_bound(halves):
    traffic = halves[0]
    placement = {"moe": Placement.even(32, 8)}
    [counted] = score_layers(placement, [traffic], 2)
    known = Traffic("moe", traffic.load_WE, traffic.pairs_EE, traffic.num_pair_tokens)
    [estimated] = score_layers(placement, [known], 2)
    assert 0.85 * counted.fan_out < estimated.fan_out <= counted.fan_out
    assert 0.75 * counted.node_fan_out < estimated.node_fan_out <= counted.node_fan_out
    assert estimated.balance == pytest.approx(counted.balance)


def test_a_lower_bound_that_is_reached():
    """Tokens that hit a rank with both experts or none: exact."""
    ids_TK = np.array([[0, 1], [2, 3], [0, 1]])
    traffic = traffic_of_ids("moe", ids_TK, 4, 1)
    known = Traffic("moe", traffic.load_WE, traffic.pairs_EE, 3)
    assert score_layers({"moe": Placement.even(4, 2)}, [known])[0].fan_out == pytest.approx(1)


def test_moved_slots_are_those_that_a_rank_lacks():
    earlier, later = Placement(((0, 1), (2, 0))), Placement(((1, 2), (0, 2)))
    assert num_moved(earlier, later) == 1
    [score] = score_layers({"moe": later}, [Traffic("moe", np.ones((1, 3), int))], earlier={"moe": earlier})
    assert score.moved == 1


def test_loads_are_nearer_to_what_the_rule_gives_than_those_of_equal_parts():
    rng = np.random.default_rng(0)
    today_WE = rng.normal(0, 1, 128) + rng.normal(0, 0.5, (2, 128))
    wants_TE = today_WE.repeat(4000, axis=0) + rng.gumbel(size=(8000, 128))
    traffic = traffic_of_ids("moe", np.argsort(-wants_TE, axis=1)[:, :6], 128, 2)
    placement = eplb_placement(traffic.load_WE.sum(0).astype(float), 160, 32)
    held_RE, counted_WR = holdings(placement), np.zeros((2, 32))
    for load_R, ids_TK in zip(counted_WR, traffic.windows, strict=True):
        ranks_TK = ranks_of_choices(placement, ids_TK, homes(len(ids_TK), 32))
        load_R += np.bincount(ranks_TK.ravel(), minlength=32) / ranks_TK.size
    estimated_WR = rank_loads(fixed_parts(held_RE, traffic.pairs_EE), traffic.load_WE)
    np.testing.assert_allclose(estimated_WR.sum(axis=1), 1, atol=1e-3)  # parts are whole numbers of 2^16
    equal_WR = traffic.load_WE / traffic.load_WE.sum(axis=1, keepdims=True) @ even_parts(held_RE).T
    assert np.abs(estimated_WR - counted_WR).sum() < 0.8 * np.abs(equal_WR - counted_WR).sum()


def test_loads_by_hand():
    """Expert 0 on ranks 0 and 1, 1 on rank 0, 2 on rank 1; nobody knows who is chosen with whom."""
    held_RE = np.array([[True, True, False], [True, False, True]])
    # 0 has 40 of 100: half lies at home, on each rank 1/2; nothing is left to be shared
    np.testing.assert_allclose(rank_loads(fixed_parts(held_RE), np.array([[40, 50, 10]])), [[0.7, 0.3]])
    # on four ranks, half of it lies elsewhere: 10 + 10 at home, and 20 free, which rank 1 gets
    held_RE = np.vstack([held_RE, np.zeros((2, 3), dtype=bool)])
    np.testing.assert_allclose(
        rank_loads(fixed_parts(held_RE), np.array([[40, 50, 10]])), [[0.6, 0.4, 0, 0]], atol=1e-3
    )


@pytest.mark.parametrize(
    ("placements", "num_nodes", "message"),
    [
        ({}, 1, r"placement: expected layer moe, got none"),
        ({"moe": Placement.even(3, 2)}, 1, r"placement of layer moe: expected 4 experts, as its traffic has, got 3"),
        ({"moe": Placement.even(4, 2)}, 3, r"nodes: expected a divisor of 2 ranks, got 3"),
    ],
)
def test_placements_of_something_else_are_refused(placements, num_nodes, message):
    with pytest.raises(ValueError, match=message):
        score_layers(placements, [Traffic("moe", np.ones((1, 4), int))], num_nodes)
