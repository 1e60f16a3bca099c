"""Planning: what always holds, how near it comes to the optimum, and that it is better than load alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.plan import Aim, Cluster, Traffic, eplb_placement, num_moved, plan_layers, score_layers, traffic_of_ids
from equipoise.plan.exact import best_balance, least_fan_out
from equipoise.plan.placement import holdings, start
from equipoise.types import Placement

FACTOR = 4 / 3  # of the optimum: longest first without a limit on slots is proven for it


@st.composite
def small_cases(draw):
    """Loads and a cluster that can hold them."""
    num_ranks, slots_per_rank = draw(st.integers(2, 3)), draw(st.integers(1, 3))
    num_experts = draw(st.integers(slots_per_rank, num_ranks * slots_per_rank))
    loads = draw(st.lists(st.integers(0, 300), min_size=num_experts, max_size=num_experts).filter(any))
    return np.array(loads), Cluster(num_ranks, num_ranks * slots_per_rank)


@settings(deadline=None, max_examples=60)
@given(small_cases())
def test_balance_is_near_the_optimum(case):
    load_E, cluster = case
    traffic = Traffic("moe", load_E[None])
    [score] = score_layers(plan_layers([traffic], cluster), [traffic])
    best = best_balance(load_E.astype(float), cluster)
    assert best - 1e-6 <= score.balance <= FACTOR * best + 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_fan_out_is_near_the_optimum(seed):
    """6 experts on 2 ranks. Planned on what it is scored on, with room for imbalance, as the optimum has."""
    rng = np.random.default_rng(seed)
    partners = rng.permutation(6).reshape(3, 2)
    ids_TK = np.array([rng.permutation(6)[:2] if rng.random() < 0.5 else partners[rng.integers(3)] for _ in range(40)])
    traffic, cluster = traffic_of_ids("moe", ids_TK, 6, 1), Cluster(2, 6)
    [score] = score_layers(plan_layers([traffic], cluster, aim=Aim(slack=2)), [traffic])
    best = least_fan_out(ids_TK, 6, cluster)
    assert best - 1e-9 <= score.fan_out <= 1.15 * best
    assert least_fan_out(ids_TK, 6, cluster, most_load=score.balance + 1e-9) <= score.fan_out + 1e-9


def test_on_windows_not_seen_it_needs_fewer_ranks_than_load_alone(halves):
    fit, held_out = halves
    cluster = Cluster(4, 32, num_nodes=2)
    alone = {"moe": eplb_placement(fit.load_WE.sum(axis=0).astype(float), 32, 4, 2)}
    [planned], [eplb] = (score_layers(each, [held_out], 2) for each in (plan_layers([fit], cluster), alone))
    assert planned.fan_out < 0.85 * eplb.fan_out
    assert planned.node_fan_out < 0.9 * eplb.node_fan_out
    assert planned.balance < 1.1 * eplb.balance


def test_every_rank_is_full_and_holds_an_expert_once(halves):
    [placement] = plan_layers(halves[:1], Cluster(8, 40)).values()
    assert placement.num_experts == 32
    assert [len(rank) for rank in placement.slots] == [5] * 8


def test_more_slack_needs_no_more_ranks(halves):
    fit = halves[0]
    found = [
        score_layers(plan_layers([fit], Cluster(8, 40), aim=Aim(slack)), [fit])[0].fan_out for slack in (1, 1.2, 1.5)
    ]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]


def test_from_load_alone_it_is_balanced(halves):
    fit = halves[0]
    blind = Traffic("moe", fit.load_WE)
    scores = score_layers(plan_layers([blind], Cluster(8, 40)), [blind])
    even = score_layers({"moe": Placement.even(32, 8)}, [blind])
    assert scores[0].balance < 1.15 < even[0].balance


def test_names_of_ranks_keep_tokens_where_they_are():
    """The next layer's experts are those of this one under other numbers: nearly all hops can stay."""
    rng = np.random.default_rng(0)
    ids_TK = np.array([4 * bundle + rng.permutation(4)[:2] for bundle in rng.integers(0, 4, 400)])
    layers = [
        traffic_of_ids(name, order[ids_TK], 16, 2)
        for name, order in zip("ab", rng.random((2, 16)).argsort(1), strict=True)
    ]
    placements = plan_layers(layers, Cluster(4, 16, 2), aim=Aim(slack=3))
    _, second = score_layers(placements, layers, 2)
    assert second.rank_hops > 0.9
    assert second.node_hops >= second.rank_hops


def test_an_earlier_placement_stays_where_moving_buys_too_little(halves):
    fit, later = halves
    cluster = Cluster(8, 40)
    earlier = plan_layers([fit], cluster)
    moved = {
        price: num_moved(earlier["moe"], plan_layers([later], cluster, earlier, Aim(move_price=price))["moe"])
        for price in (0.0, 0.005, 10.0)
    }
    afresh = num_moved(earlier["moe"], plan_layers([later], cluster)["moe"])
    assert moved[10.0] <= moved[0.005] <= moved[0.0] < afresh
    assert moved[10.0] < 10  # copies of experts that are hot now


def test_the_start_finds_room_where_only_ranks_with_the_expert_have_some():
    # rank 0 keeps 0 and 1, rank 1 keeps 0 and 2: one slot is left on each, and 3 has two copies
    held = np.array([[True, True, False, False], [True, False, True, False]])
    slots = start(np.ones(4), np.array([2, 1, 1, 2]), Cluster(2, 6), held)
    assert [sorted(rank) for rank in slots.tolist()] == [[0, 1, 3], [0, 2, 3]]
    # 0 is placed last, as the lightest: all room is then on one rank
    slots = start(np.array([0.0, 5, 5, 1]), np.array([2, 2, 1, 1]), Cluster(2, 6), None)
    assert all(len(set(rank)) == 3 for rank in slots.tolist())


@settings(deadline=None)
@given(small_cases(), st.randoms(use_true_random=False))
def test_any_start_is_whole(case, random):
    load_E, cluster = case
    num_experts = len(load_E)
    held = np.array([[random.random() < 0.5 for _ in range(num_experts)] for _ in range(cluster.num_ranks)])
    traffic = Traffic("moe", load_E[None])
    owners = [random.randrange(cluster.num_ranks) for _ in range(num_experts)]
    held[owners, range(num_experts)] = True
    earlier = {"moe": Placement(tuple(tuple(np.flatnonzero(row).tolist()) for row in held))}
    placement = plan_layers([traffic], cluster, earlier)["moe"]
    assert [len(rank) for rank in placement.slots] == [cluster.slots_per_rank] * cluster.num_ranks
    assert holdings(placement).shape == (cluster.num_ranks, num_experts)


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 8, 1), r"ranks: expected at least 1, got 0"),
        ((4, 0, 1), r"slots: expected at least 1, got 0"),
        ((4, 8, 0), r"nodes: expected at least 1, got 0"),
        ((4, 8, 3), r"nodes: expected a divisor of 4 ranks, got 3"),
        ((4, 10, 1), r"slots: expected a multiple of 4 ranks, got 10; .* so take 8 or 12"),
    ],
)
def test_clusters_that_do_not_divide_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        Cluster(*numbers)


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (Cluster(2, 2), r"layer moe: slots: expected at least one for each of 4 experts, got 2"),
        (Cluster(2, 10), r"layer moe: slots: 10 cannot be filled with 4 experts, a rank holds each at most once"),
    ],
)
def test_slots_that_do_not_fit_the_experts_are_refused(cluster, message):
    with pytest.raises(ValueError, match=message):
        plan_layers([Traffic("moe", np.ones((1, 4), int))], cluster)


@pytest.mark.parametrize(
    ("earlier", "message"),
    [
        ({"other": Placement.even(4, 2)}, r"earlier placement: expected layer moe, got other; it is of another model"),
        ({"moe": Placement.even(4, 4)}, r"layer moe: expected 2 ranks, got 4; plan without it, or for its sizes"),
        ({"moe": Placement.even(6, 2)}, r"layer moe: expected 4 experts, got 6"),
    ],
)
def test_an_earlier_placement_of_other_sizes_is_refused(earlier, message):
    with pytest.raises(ValueError, match=message):
        plan_layers([Traffic("moe", np.ones((1, 4), int))], Cluster(2, 4), earlier)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slack": 0.9}, r"slack: expected 1 or more, got 0.9"),
        ({"slack": float("nan")}, r"slack: expected 1 or more, got nan"),
        ({"move_price": -1}, r"move_price: expected 0 or more ranks per token, got -1"),
    ],
)
def test_aims_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Aim(**options)
