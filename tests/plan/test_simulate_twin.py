"""The slow twin: the same queues as processes of SimPy, event by event. Both must serve each query at the same time.

The simulation itself jumps from step to step; here queries arrive, wait and are turned away by themselves.
"""

import numpy as np
import pytest

from equipoise.plan.fleet.arrivals import arrival_times
from equipoise.plan.fleet.cell import Cell
from equipoise.plan.fleet.scenario import Batching, Demand

simpy = pytest.importorskip("simpy", reason="the slow twin needs SimPy: pip install 'equipoise[dev]'")


def seconds_of(num_queries):
    """Of a step: something that is not constant and not linear."""
    return 2e-4 + 1e-5 * num_queries + 3e-4 * (num_queries % 3)


def by_events(times, batching):
    """start, done and rejected of each query, by SimPy."""
    env = simpy.Environment()
    start, done, rejected = np.full(len(times), np.inf), np.full(len(times), np.inf), np.zeros(len(times), dtype=bool)
    waiting, news = [], [env.event()]

    def clients():
        for number, time in enumerate(times):
            yield env.timeout(max(time - env.now, 0))
            if len(waiting) < batching.max_waiting:
                waiting.append(number)
                news[0].succeed()
                news[0] = env.event()
            else:
                rejected[number] = True

    def ranks():
        while True:
            while not waiting:
                yield news[0]
            window = env.timeout(max(times[waiting[0]] + batching.window_s - env.now, 0))
            while len(waiting) < min(batching.max_batch, batching.max_waiting) and not window.processed:
                yield window | news[0]
            taken = waiting[: batching.max_batch]
            del waiting[: len(taken)]
            start[taken] = env.now
            yield env.timeout(seconds_of(len(taken)))
            done[taken] = env.now

    env.process(clients())
    env.process(ranks())
    env.run()
    return start, done, rejected


@pytest.mark.parametrize("qps", [300.0, 3_000.0, 30_000.0])
@pytest.mark.parametrize(
    "batching",
    [
        Batching(window_s=0.0, max_batch=1, max_waiting=5),
        Batching(window_s=1e-3, max_batch=8, max_waiting=1000),
        Batching(window_s=5e-3, max_batch=100, max_waiting=12),
        Batching(window_s=2e-3, max_batch=6, max_waiting=6),
    ],
    ids=lambda b: f"{b.window_s:g}-{b.max_batch}-{b.max_waiting}",
)
def test_each_query_is_served_at_the_same_time(qps, batching):
    times = arrival_times(np.random.default_rng(1), Demand(qps=qps, seconds=0.3, burst=4.0))
    start, done, rejected = by_events(times, batching)
    cell = Cell(times, np.zeros(len(times), dtype=np.int64), batching, 1)
    while np.isfinite(at := cell.next_start()):
        taken = cell.take(at)
        cell.finish(taken, at, seconds_of(len(taken)))
    assert len(times) > 50
    assert np.array_equal(cell.rejected_N, rejected)
    assert cell.start_N == pytest.approx(start, abs=1e-9)
    assert cell.done_N == pytest.approx(done, abs=1e-9)
