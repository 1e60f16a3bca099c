"""The simulation against closed forms, against hand-made sums, and what must hold for any scenario."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.plan.fleet.arrivals import arrival_times, hashed_shares
from equipoise.plan.fleet.cell import Cell
from equipoise.plan.fleet.routes import admit, draw, popularity, positions
from equipoise.plan.fleet.scenario import Batching, Demand, Design, Machines, ModelShape, Scenario
from equipoise.plan.fleet.simulate import Trace, holders, simulate
from equipoise.plan.fleet.step import step
from equipoise.plan.links import Cost, Links
from equipoise.types import Placement

FREE = Cost(0.0, math.inf)
SMALL = Scenario(
    model=ModelShape(num_experts=8, top_k=2, num_layers=2, dim=16, hidden_dim=32, capacity=None),
    machines=Machines(ranks=4, link=Cost(1e-5, 1e9), expert=Cost(1e-5, 1e9)),
    batching=Batching(window_s=1e-3),
    traffic=Demand(qps=5_000, seconds=0.2, skew=0.0),
)


def changed(scenario, **parts):
    """The scenario with some fields of its parts replaced: changed(s, traffic={"qps": 5})."""
    return replace(scenario, **{name: replace(getattr(scenario, name), **fields) for name, fields in parts.items()})


# ---------------------------------------------------------------------------------------------- closed forms


def waits(load, seconds_of_service, num=200_000):
    """Mean wait of one server that takes one query at a time, by the simulation's own queue."""
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.exponential(1 / load, size=num))
    service = seconds_of_service(rng, num)
    cell = Cell(times, np.zeros(num, dtype=np.int64), Batching(window_s=0.0, max_batch=1, max_waiting=num), 1)
    for n in range(num):
        start = cell.next_start()
        cell.finish(cell.take(start), start, service[n])
    return float(np.mean(cell.start_N - cell.times))


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_waiting_of_m_d_1(load):
    """Pollaczek-Khinchine: load / (2 (1 - load)) services of 1 s. 200 000 queries know it to a few per cent."""
    assert waits(load, lambda rng, num: np.ones(num)) == pytest.approx(load / (2 * (1 - load)), rel=0.05)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_waiting_of_m_m_1(load):
    assert waits(load, lambda rng, num: rng.exponential(1, num)) == pytest.approx(load / (1 - load), rel=0.08)


def test_a_rank_alone_is_m_d_1():
    """The same through `simulate`: one rank and expert, no links, a query per step."""
    service = 1e-3
    scenario = Scenario(
        model=ModelShape(num_experts=1, top_k=1, num_layers=1, capacity=None),
        machines=Machines(ranks=1, expert=Cost(service, math.inf)),
        batching=Batching(window_s=0.0, max_batch=1),
        traffic=Demand(qps=500, seconds=40),
    )
    result = simulate(scenario)
    assert result.wait_s == pytest.approx(service * 0.5 / (2 * 0.5), rel=0.1)
    assert result.latency.mean - result.wait_s == pytest.approx(service)
    assert result.queue_mean == pytest.approx(500 * result.wait_s, rel=0.15)  # Little's law, on the queue's samples
    assert result.busy_R[0] == pytest.approx(0.5, rel=0.05)


def test_without_load_latency_is_the_sum_of_its_parts():
    """A query every second, one token, one layer of 4 experts on 4 ranks, top-4: all experts, each on its own rank.

    Window 1 ms; counts 10 us; there: 10 us + 3 rows out of one rank, 3 * 32 B / 1e6 B/s = 96 us; the expert:
    20 us + 6 * 16 * 8 FLOP / 1e8 = 7.68 us; back: the rank at home gets 3 rows, 96 us from when the first is done,
    + 10 us; the rest 5 us; the scheduler 3 us.
    """
    scenario = Scenario(
        model=ModelShape(num_experts=4, top_k=4, num_layers=1, dim=16, hidden_dim=8, capacity=None),
        machines=Machines(
            ranks=4, link=Cost(10e-6, 1e6), expert=Cost(20e-6, 1e8), rest_s=5e-6, step_s=3e-6, counts_first=True
        ),
        batching=Batching(window_s=1e-3),
        traffic=Demand(qps=1, seconds=60),
    )
    parts = 1e-3 + 10e-6 + (10e-6 + 96e-6) + 27.68e-6 + (96e-6 + 10e-6) + 5e-6 + 3e-6
    latency = simulate(scenario).latency
    assert latency.p50 == pytest.approx(parts, rel=1e-9)
    assert latency.max < 2 * parts


@pytest.mark.parametrize(("ranks", "top_k"), [(4, 2), (8, 8), (16, 2)])
def test_bytes_on_links_are_the_arithmetic(ranks, top_k):
    """Even routing over many experts: R (1 - (1 - 1/R)^k) ranks per token, one of R of them at home."""
    scenario = changed(SMALL, model={"num_experts": 64 * ranks, "top_k": top_k}, machines={"ranks": ranks})
    result = simulate(scenario)
    expected = ranks * (1 - (1 - 1 / ranks) ** top_k) * (1 - 1 / ranks)
    assert result.copies_per_token == pytest.approx(expected, rel=0.02)
    # each copy is sent once and its result once: by every rank, on average, 2 copies d b per token of its share
    tokens = result.assignments / (2 * top_k)
    assert sum(result.link_bytes_R) == pytest.approx(2 * tokens * 2 * result.copies_per_token * 16 * 2)


def test_two_tiers_send_one_copy_or_none():
    per_token = simulate(replace(SMALL, design=Design(groups=4)))
    assert per_token.copies_per_token == pytest.approx(1 - 1 / 4, rel=0.05)
    per_query = simulate(replace(SMALL, design=Design(groups=4, scope="query")))
    assert per_query.copies_per_token == 0
    assert sum(per_query.link_bytes_R) == 0
    halves = simulate(replace(SMALL, design=Design(groups=2, scope="query")))
    # 2 ranks of 2 experts each, both of top-2 elsewhere or not: 1 - (chance that both are at home) = 1 - 1/6
    assert halves.copies_per_token == pytest.approx(1 - 1 / 6, rel=0.05)


# ---------------------------------------------------------------------------------------------- a step, by hand

MODEL = ModelShape(num_experts=4, top_k=2, num_layers=1, dim=1, hidden_dim=1, bytes_per_element=1, capacity=None)
MACHINES = Machines(ranks=2, link=Cost(0.0, 1.0), expert=Cost(10.0, 6.0))  # a row: 1 s on a link, 1 s in an expert
HOLDERS = holders(Placement.even(4, 2))[None]


def test_a_token_crosses_once_for_two_experts():
    """Token at rank 0 with both experts at rank 1: 1 s there, 2 experts of 11 s, 1 s back."""
    done = step(MODEL, MACHINES, HOLDERS, np.array([[[2, 3]]]), np.ones((1, 1, 2), dtype=bool), np.array([0]))
    assert (done.seconds, done.copies) == (24.0, 1)
    assert done.sent_R.tolist() == [1, 1]
    assert done.busy_R.tolist() == [0, 22]
    assert (done.expert_s, done.link_s) == (22.0, 2.0)


def test_what_does_not_fit_is_computed_at_home():
    """Both assignments spilled: no link; the shared expert of rank 0 takes 10 + 2 s."""
    ids, fits = np.array([[[2, 3]]]), np.zeros((1, 1, 2), dtype=bool)
    model = replace(MODEL, overflow="shared")
    done = step(model, MACHINES, HOLDERS, ids, fits, np.array([0]))
    assert (done.copies, done.busy_R.tolist(), done.seconds) == (0, [12, 0], 12.0)
    dropped = step(replace(model, overflow="drop"), MACHINES, HOLDERS, ids, fits, np.array([0]))
    assert (dropped.copies, dropped.busy_R.tolist(), dropped.seconds) == (0, [0, 0], 0.0)


def test_a_replica_at_home_saves_the_way():
    table_ER = holders(Placement(((0, 1, 2), (2, 3))))
    assert table_ER[2].tolist() == [0, 1]
    done = step(MODEL, MACHINES, table_ER[None], np.array([[[1, 2]]]), np.ones((1, 1, 2), dtype=bool), np.array([0]))
    assert done.copies == 0


# ---------------------------------------------------------------------------------------------- who gets which expert


def test_first_choices_come_before_second_ones():
    choices = np.array([[[0, 1], [1, 0], [0, 1]]])
    ids, fits = admit(choices, 2, room=2)
    # expert 0 takes tokens 0 and 2 as first choices; expert 1 takes token 1, then token 0's second choice
    assert np.array_equal(ids, choices)
    assert fits.tolist() == [[[True, True], [True, False], [True, False]]]


def test_further_choices_are_asked_in_turn():
    choices = np.array([[[0, 1, 2], [0, 1, 2], [0, 1, 2]]])
    ids, fits = admit(choices, 1, room=1)
    assert ids.tolist() == [[[0], [1], [2]]]
    assert fits.all()
    _, fits = admit(choices[:, :, :2], 1, room=1)
    assert fits.tolist() == [[[True], [True], [False]]]


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 5))
def test_nobody_takes_more_than_there_is_room(seed, top_k, room):
    rng = np.random.default_rng(seed)
    choices = draw(rng, popularity(rng, 2, 6, 1.0)[:, None], 9, 6)
    ids, fits = admit(choices, top_k, room)
    for layer in range(2):
        taken = np.bincount(ids[layer][fits[layer]], minlength=6)
        assert taken.max() <= room
        assert fits[layer].sum() == min(9 * top_k, taken.sum())
        for token in range(9):
            assert len(set(ids[layer, token][fits[layer, token]])) == fits[layer, token].sum()
        if not fits[layer].all():  # who has no place has asked everyone it hadn't: all of them are full
            token = np.nonzero(~fits[layer].all(axis=1))[0][0]
            free = set(np.nonzero(taken < room)[0]) - set(ids[layer, token])
            assert not free


def test_shares_of_first_choices_are_the_popularity():
    rng = np.random.default_rng(0)
    popular = popularity(rng, 1, 8, 1.0)
    first = draw(rng, popular[:, None], 40_000, 2)[0, :, 0]
    assert np.bincount(first, minlength=8) / 40_000 == pytest.approx(popular[0], abs=0.01)


def test_positions_count_those_before():
    assert positions(np.array([3, 1, 3, 3, 1])).tolist() == [0, 0, 1, 2, 1]


# ---------------------------------------------------------------------------------------------- arrivals


@pytest.mark.parametrize("burst", [1.0, 5.0])
def test_the_mean_rate_is_kept(burst):
    times = arrival_times(np.random.default_rng(0), Demand(qps=1000, seconds=200, burst=burst))
    assert len(times) / 200 == pytest.approx(1000, rel=0.1)
    assert np.all(np.diff(times) >= 0)
    per_slot = np.bincount((times / 0.02).astype(int), minlength=10_000)  # as long as a burst
    # Poisson counts have variance = mean; with bursts of 5 times the rate they have far more
    assert bool(per_slot.var() / per_slot.mean() < 1.1) is (burst == 1)


def test_one_popular_key_makes_its_group_the_busiest():
    even, skewed = (hashed_shares(np.random.default_rng(0), 4, skew) for skew in (0.0, 1.0))
    assert even == pytest.approx([0.25] * 4, abs=0.01)
    assert skewed.sum() == pytest.approx(1)
    assert skewed.max() > 0.28  # the first of 50 000 keys has 8.8 %


# ---------------------------------------------------------------------------------------------- what always holds


@settings(max_examples=25)
@given(
    qps=st.floats(100, 50_000),
    groups=st.sampled_from([1, 2, 4]),
    scope=st.sampled_from(["token", "query"]),
    first=st.sampled_from(["hash", "learned"]),
    overflow=st.sampled_from(["shared", "next_choice", "drop"]),
    max_waiting=st.integers(1, 30),
    burst=st.sampled_from([1.0, 8.0]),
)
def test_nothing_is_lost(qps, groups, scope, first, overflow, max_waiting, burst):
    scenario = changed(
        SMALL,
        model={"capacity": 1.0, "overflow": overflow},
        batching={"max_waiting": max_waiting, "max_batch": 8},
        traffic={"qps": qps, "seconds": 0.05, "burst": burst, "skew": 1.0, "tokens": 2},
    )
    result = simulate(replace(scenario, design=Design(groups=groups, scope=scope, first=first)))
    assert result.arrived == result.served + result.in_flight + result.rejected
    assert result.assignments == round(result.steps * result.tokens_per_step) * 2 * 2  # layers, top-2
    assert 0 <= result.moved + result.spilled + result.dropped <= result.assignments
    assert result.spilled == 0 or overflow == "shared"
    assert result.moved == 0 or overflow == "next_choice"
    assert 0 <= result.queue_mean <= result.queue_max <= max_waiting * 4
    assert all(busy <= 1.05 + 1 / max(result.steps, 1) for busy in result.busy_R)


def test_a_seed_is_a_result():
    scenario = changed(SMALL, model={"capacity": 1.1}, traffic={"skew": 1.0})
    first, again, other = (simulate(scenario, seed=seed) for seed in (0, 0, 1))
    assert first.fields() == again.fields()
    assert np.array_equal(first.latencies, again.latencies)
    assert first.fields() != other.fields()


def test_designs_see_the_same_arrivals():
    flat, tiers = (simulate(replace(SMALL, design=Design(groups=groups))) for groups in (1, 4))
    assert flat.arrived == tiers.arrived


def test_more_load_is_slower_and_too_much_is_turned_away():
    few = {"window_s": 0.0, "max_batch": 4, "max_waiting": 20}
    loads = [changed(SMALL, traffic={"qps": qps}, batching=few) for qps in (1e3, 1e4, 2e5)]
    results = [simulate(scenario) for scenario in loads]
    assert [r.latency.p99 for r in results] == sorted(r.latency.p99 for r in results)
    assert [r.queue_mean for r in results] == sorted(r.queue_mean for r in results)
    assert results[0].rejected == 0 < results[-1].rejected
    assert results[-1].throughput < 1.5e5


def test_more_skew_is_slower_and_spills_more():
    skews = [changed(SMALL, traffic={"skew": skew, "qps": 20_000}) for skew in (0.0, 1.0, 2.0)]
    results = [simulate(scenario) for scenario in skews]
    assert [r.straggler for r in results] == sorted(r.straggler for r in results)
    assert results[0].latency.p50 < results[2].latency.p50
    spills = [simulate(changed(scenario, model={"capacity": 1.1})).spilled for scenario in skews]
    assert 0 < spills[0] < spills[1] < spills[2]


def test_drift_moves_the_hot_rank():
    """With a hot expert that stays, one link carries the most; when it wanders over all ranks, the load evens out."""
    still = changed(SMALL, traffic={"skew": 3.0, "seconds": 0.4}, model={"num_layers": 1})
    wandering = changed(still, traffic={"drift_s": 0.05})  # once around the 8 experts
    spread = [max(r.busy_R) / (sum(r.busy_R) / 4) for r in (simulate(still), simulate(wandering))]
    assert spread[0] > 1.2 * spread[1]


def test_a_stop_gives_what_there_is():
    asked = []

    def stop(now):
        asked.append(now)
        return now > 0.1

    result = simulate(SMALL, stop=stop)
    assert asked == sorted(asked)
    assert 0.1 < result.seconds < 0.11
    assert result.arrived == result.served + result.in_flight + result.rejected
    assert result.served > 0


def test_before_anybody_is_served_there_is_no_latency():
    result = simulate(changed(SMALL, traffic={"seconds": 1e-9}))
    assert math.isnan(result.latency.p99)
    assert result.fields()["latency"]["p99"] is None


# ---------------------------------------------------------------------------------------------- traces, placements


def test_a_trace_is_replayed():
    """All recorded tokens go to the experts 6 and 7, both on the last rank: all others rest."""
    result = simulate(SMALL, trace=Trace(np.full((2, 5, 2), [6, 7])))
    assert result.busy_R[:3] == (0, 0, 0)
    assert result.busy_R[3] > 0
    assert result.copies_per_token == pytest.approx(3 / 4, rel=0.05)


def test_a_placement_of_replicas_relieves_the_hot_rank():
    trace = Trace(np.full((2, 5, 2), [6, 7]))
    placement = Placement(((0, 1, 6), (2, 3, 7), (4, 5, 6), (6, 7)))
    plain, placed = (
        simulate(replace(SMALL, design=Design(placements=where)), trace=trace) for where in ((), (placement,))
    )
    assert max(placed.busy_R) < max(plain.busy_R)


@pytest.mark.parametrize(
    ("scenario", "ids", "says"),
    [
        (replace(SMALL, design=Design(groups=2)), np.zeros((2, 3, 2), int), "trace: expected flat routing, as was"),
        (SMALL, np.zeros((3, 3, 2), int), "expected 2 layers of top-2, got 3 layers of top-2"),
        (SMALL, np.full((2, 3, 2), 8), r"expected one or more tokens with experts in 0\.\.7"),
        (SMALL, np.zeros((2, 0, 2), int), "expected one or more tokens"),
        (
            changed(SMALL, model={"capacity": 1.0, "overflow": "next_choice"}),
            np.zeros((2, 3, 2), int),
            "trace: expected overflow shared or drop: what tokens would choose next was not recorded",
        ),
    ],
)
def test_traces_that_do_not_fit(scenario, ids, says):
    with pytest.raises(ValueError, match=says):
        simulate(scenario, trace=Trace(ids))


# ---------------------------------------------------------------------------------------------- calibration, mistakes


def test_measured_links_hold_for_other_numbers_of_ranks():
    line, unused = Cost(3e-4, 1e9), Cost(1.0, 1.0)
    measured = {"all_gather": unused, "reduce_scatter": unused, "all_reduce": unused, "barrier_s": 1.0, "dim": 1}
    links = Links(ranks=4, backend="gloo", device="cpu", all_to_all=line, expert=unused, hidden_dim=1, **measured)
    machines = Machines.measured(links, 16)
    assert machines.link.start_s == pytest.approx(15e-4)  # 1e-4 for each of 15 peers
    assert machines.exchange(4).start_s == pytest.approx(3e-4)
    assert machines.link.rate == machines.exchange(4).rate == 1e9


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ModelShape(num_layers=0), "num_layers: expected at least 1, got 0"),
        (lambda: ModelShape(num_experts=2, top_k=3), "top_k: expected at most the 2 experts, got 3"),
        (lambda: ModelShape(capacity=0.0), "capacity: expected a factor above 0, or None for no limit, got 0.0"),
        (lambda: Machines(ranks=0), "ranks: expected at least 1, got 0"),
        (lambda: Machines(rest_s=-1.0), "rest_s: expected at least 0 seconds, got -1.0"),
        (lambda: Batching(max_batch=0), "max_batch: expected at least 1, got 0"),
        (lambda: Batching(window_s=math.nan), "window_s: expected at least 0 seconds, got nan"),
        (lambda: Demand(qps=0.0), "qps: expected a number above 0, got 0.0"),
        (lambda: Demand(skew=-1.0), "skew: expected an exponent of at least 0, got -1.0"),
        (lambda: Demand(drift_s=0.0), "drift_s: expected seconds above 0, or None for no drift, got 0.0"),
        (lambda: Demand(burst=20.0), "burst: expected 1 to 1 / burst_share .* got burst = 20.0 and burst_share = 0.1"),
        (lambda: Scenario(design=Design(groups=3)), "groups: expected a divisor of 16 ranks and of 64 experts, got 3"),
        (
            lambda: Scenario(model=ModelShape(top_k=8), design=Design(groups=16)),
            "top_k: expected at most the 4 experts of one of 16 groups, got 8; take fewer groups",
        ),
        (
            lambda: Scenario(design=Design(groups=2, placements=(Placement.even(64, 16),))),
            "placements: expected flat routing, got 2 groups",
        ),
        (
            lambda: Scenario(design=Design(placements=(Placement.even(64, 8),))),
            "placements: expected 64 experts on 16 ranks, got 64 on 8",
        ),
        (
            lambda: Scenario(design=Design(placements=(Placement.even(64, 16),) * 3)),
            "placements: expected one, or one for each of 16 layers, got 3",
        ),
    ],
)
def test_mistakes_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
