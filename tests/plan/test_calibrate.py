"""Costs of rehearsed steps: made by known machines, they are found again; and steps vary as those rehearsed did."""

from dataclasses import replace

import numpy as np
import pytest

from equipoise.plan.fleet.calibrate import Rehearsed, calibrated
from equipoise.plan.fleet.routes import draw, popularity
from equipoise.plan.fleet.scenario import Batching, Demand, Machines, ModelShape, Scenario
from equipoise.plan.fleet.simulate import holders, simulate
from equipoise.plan.fleet.step import ALIKE, step, varied
from equipoise.plan.links import Cost
from equipoise.types import Placement

MODEL = ModelShape(num_experts=8, top_k=2, num_layers=2, dim=64, hidden_dim=128, bytes_per_element=4, capacity=None)
RANKS = 4
HOLDER_LER = np.broadcast_to(holders(Placement.even(8, RANKS)), (2, 8, RANKS))
TRUE = Machines(
    ranks=RANKS, link=Cost(3e-4, 5e6), expert=Cost(2e-4, 2e9), step_s=1e-3, counts_first=True, cores=2
)  # fmt: skip


def rehearsed(machines, num=90, noise=lambda rng: 1.0, seed=0):
    """Steps of 1 to 64 tokens that take what these machines take, times the noise."""
    rng, steps = np.random.default_rng(seed), []
    for number in range(num):
        tokens = 2 ** (number % 7)
        ids_LTK = draw(rng, popularity(rng, 2, 8, 2 * rng.random())[:, None], tokens, 2)
        home_T = rng.integers(RANKS, size=tokens)
        taken = step(MODEL, machines, HOLDER_LER, ids_LTK, np.ones(ids_LTK.shape, dtype=bool), home_T)
        steps.append(Rehearsed(ids_LTK, home_T, taken.seconds * noise(rng), taken.busy_R))
    return steps


def begin(machines):
    """Machines of which only the number of ranks and what they share is known."""
    return replace(machines, link=Cost(1e-5, 1e8), expert=Cost(1e-6, 1e12), step_s=0.0)


@pytest.mark.parametrize("cores", [None, 2, 1])
def test_known_machines_are_found_again(cores):
    true = replace(TRUE, cores=cores)
    found = calibrated(MODEL, begin(true), HOLDER_LER, rehearsed(true))
    assert found.expert.start_s == pytest.approx(2e-4, rel=1e-3)
    assert found.expert.rate == pytest.approx(2e9, rel=1e-3)
    assert found.link.rate == pytest.approx(5e6, rel=0.02)
    # all steps have two layers, so what a step takes and what its six exchanges take are only known together
    assert found.step_s + 6 * found.link.start_s == pytest.approx(1e-3 + 6 * 3e-4, rel=0.02)
    assert [ratio for _, ratio in found.spread] == pytest.approx([1.0] * 90, rel=0.02)
    assert found.cores == cores
    assert found.counts_first


def test_means_are_met_where_steps_vary():
    """One step in ten takes five times as long: a median would not know."""
    steps = rehearsed(TRUE, 350, lambda rng: 5.0 if rng.random() < 0.1 else 1.0)
    found = calibrated(MODEL, begin(TRUE), HOLDER_LER, steps)
    assert np.mean([ratio for _, ratio in found.spread]) == pytest.approx(1.0, abs=0.02)
    assert max(ratio for _, ratio in found.spread) > 3
    costs = [seconds for seconds, _ in found.spread]
    assert costs == sorted(costs)


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="calibrated: expected at least 10 rehearsed steps, got 9; rehearse longer"):
        calibrated(MODEL, TRUE, HOLDER_LER, rehearsed(TRUE, 9))


# ---------------------------------------------------------------------------------------------- spread and cores


def test_a_step_varies_as_those_most_like_it():
    spread = tuple((float(n), 1.0 if n < 50 else 2.0) for n in range(100))
    rng = np.random.default_rng(0)
    assert {varied(spread, 0.0, rng) for _ in range(50)} == {1.0}
    assert {varied(spread, 1e9, rng) for _ in range(50)} == {2.0}
    assert {varied(spread, 50.0, rng) for _ in range(200)} == {1.0, 2.0}
    few = ((1.0, 3.0),)
    assert len(few) < ALIKE
    assert varied(few, 5.0, rng) == 3.0


def test_without_a_spread_nothing_is_drawn():
    rng = np.random.default_rng(0)
    assert varied((), 1.0, rng) == 1.0
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


def test_steps_that_take_twice_as_long_serve_later():
    scenario = Scenario(
        model=MODEL, machines=TRUE, batching=Batching(window_s=1e-3), traffic=Demand(qps=20.0, seconds=5.0)
    )
    slow = replace(scenario, machines=replace(TRUE, spread=((1.0, 2.0),)))
    window = 1e-3  # that a query alone waits
    once, twice = (simulate(each, seed=1).latency.p50 - window for each in (scenario, slow))
    assert twice == pytest.approx(2 * once, rel=0.1)


def test_ranks_that_share_cores_wait_for_all_work():
    """Four tokens, one for each rank, whose experts are at home: no bytes; four experts of 1 s on 4, 2 and 1 cores."""
    ids_LTK = np.array([[[0, 1], [2, 3], [4, 5], [6, 7]]])
    model = replace(MODEL, num_layers=1)
    free = Machines(ranks=RANKS, link=Cost(0.0, np.inf), expert=Cost(0.5, np.inf))
    for cores, seconds in ((None, 1.0), (4, 1.0), (2, 2.0), (1, 4.0)):
        taken = step(
            model, replace(free, cores=cores), HOLDER_LER[:1], ids_LTK, np.ones((1, 4, 2), dtype=bool), np.arange(4)
        )
        assert taken.seconds == pytest.approx(seconds)
    one = ids_LTK[:, :1]  # alone, a rank has a core for itself
    assert (
        step(model, replace(free, cores=1), HOLDER_LER[:1], one, np.ones((1, 1, 2), dtype=bool), np.arange(1)).seconds
        == 1
    )


def test_no_cores_are_refused():
    with pytest.raises(ValueError, match="cores: expected at least 1, got 0"):
        Machines(cores=0)
