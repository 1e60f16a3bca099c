"""The fleet benchmark runs real ranks beside the simulation, and its ranks compute what experts compute."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.fleet_ranks import LEAST_STEPS, Rank
from benchmarks.netns import unusable

from equipoise.plan.fleet.scenario import ModelShape

ROOT = Path(__file__).parents[2]


def run_benchmark(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "benchmarks.fleet", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def check(done):
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    comparison, calibration = report["tables"]
    rows = {row[""]: row for row in comparison["rows"]}
    assert set(rows) == {
        "latency p50 [ms]", "latency p99 [ms]", "waiting, mean [ms]", "served per second", "queries per step"
    }  # fmt: skip
    for row in rows.values():
        assert row["error [%]"] == pytest.approx(100 * (row["simulated"] / row["real"] - 1))
    for name in ("real", "simulated"):
        assert 0 < rows["waiting, mean [ms]"][name] < rows["latency p99 [ms]"][name]
        assert rows["latency p50 [ms]"][name] <= rows["latency p99 [ms]"][name]
    assert rows["served per second"]["simulated"] <= 2 * rows["served per second"]["real"]  # the same arrivals
    (qps,) = {row["queries/s"] for row in comparison["rows"]}
    of_load, of_links = f"{qps:g} queries/s", "links alone"
    parts = {row["part"]: row for row in calibration["rows"]}
    assert all(row[name] is None or row[name] >= 0 for row in parts.values() for name in (of_load, of_links))
    assert parts["steps rehearsed"][of_load] >= 2 * 8 * LEAST_STEPS  # two rehearsals of eight sizes
    assert parts["steps rehearsed"][of_links] == 0
    return report


def test_smoke():
    assert "over loopback" in check(run_benchmark("--smoke", "--json"))["tables"][0]["title"]


@pytest.mark.skipif(unusable() is not None, reason=str(unusable()))
def test_smoke_in_namespaces():
    report = check(run_benchmark("--smoke", "--json", "--rate", "100"))
    assert report["tables"][0]["title"] == "2 ranks over links of 100 Mbit/s"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--experts", "6"), "experts: expected a multiple of 4 ranks, got 6"),
        (("--qps", "0"), "qps: expected a number above 0, got 0.0"),
        (("--window", "-1"), "window_s: expected at least 0 seconds, got -0.001"),
    ],
)
def test_mistakes_are_named(arguments, says):
    done = run_benchmark(*arguments)
    assert done.returncode == 2
    assert says in done.stderr


def test_a_layer_of_one_rank_is_the_sum_of_its_experts():
    model = ModelShape(num_experts=4, top_k=2, num_layers=1, dim=8, hidden_dim=16, capacity=None)
    rank = Rank.made(model, 0, 1)
    x_TD, ids_TK = torch.randn(5, 8), torch.tensor([[0, 1], [1, 3], [2, 0], [3, 2], [0, 3]])
    y_TD = rank.layer(x_TD, ids_TK, lambda rows, sends, gets: rows, lambda counts: counts)
    expected = [sum(rank.expert(e, x_TD[t : t + 1]) for e in ids_TK[t].tolist()) for t in range(5)]
    assert torch.allclose(y_TD, torch.cat(expected), atol=1e-6)


def test_a_layer_of_two_ranks_is_the_sum_of_their_experts():
    """Both ranks in one process: what rank 0 sends is handed to rank 1's layer by hand."""
    model = ModelShape(num_experts=4, top_k=2, num_layers=1, dim=8, hidden_dim=16, capacity=None)
    first, second = (Rank.made(model, number, 2) for number in (0, 1))
    x_TD, ids_TK = torch.randn(3, 8), torch.tensor([[0, 1], [1, 3], [2, 3]])
    sent = []

    def remote(rows, sends, gets):
        """Rank 1's rows are computed by rank 1, the others stay."""
        sent.append(sends)
        if len(sent) == 2:  # on the way home
            return torch.cat([rows, there[0]])
        here, away = rows.split(sends)
        x_RD, ids_RK = away[:, :8], away[:, 8:].long()
        pairs = zip(x_RD, ids_RK.tolist(), strict=True)
        there.append(torch.stack([sum(second.expert(e - 2, x[None])[0] for e in ids if e >= 2) for x, ids in pairs]))
        return here

    there = []
    y_TD = first.layer(x_TD, ids_TK, remote, lambda counts: torch.tensor([counts[0], 0]))
    owner = [first, first, second, second]
    expected = [sum(owner[e].expert(e % 2, x_TD[t : t + 1]) for e in ids_TK[t].tolist()) for t in range(3)]
    assert torch.allclose(y_TD, torch.cat(expected), atol=1e-6)
    assert sent[0] == [2, 2]  # tokens 0 and 1 need rank 0, tokens 1 and 2 rank 1; token 2 goes there once
