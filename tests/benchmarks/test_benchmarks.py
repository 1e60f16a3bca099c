"""The benchmarks run and say what they left out. Their numbers are not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_benchmark(module):
    """What `python -m benchmarks.<module> --smoke --json` prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", f"benchmarks.{module}", "--smoke", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows_by_name(table):
    """Rows under the cell of their first column."""
    return {next(iter(row.values())): row for row in table["rows"]}


def test_breaker_benchmark_reports_both_granularities_and_the_record():
    guarding, record = run_benchmark("breaker")["tables"]
    assert [row["granularity"] for row in guarding["rows"]] == ["layer", "expert"] * 2
    for row in guarding["rows"]:
        share = row["share of the forward [%]"]
        assert 0 < share["low"] <= share["median"] <= share["high"] < 100
        assert row["guarded / unguarded"]["median"] > 0
        assert row["clocks [ms per forward]"]["low"] > 0
    assert [row["groups"] for row in record["rows"]] == [2, 16]
    assert all(row["record [us]"]["median"] > 0 for row in record["rows"])


def test_detection_benchmark_notices_every_strong_fault_and_shows_where_that_ends():
    *strong, faults, family = run_benchmark("detection")["tables"]
    assert [table["title"].split(", ")[1] for table in strong] == ["relative", "with baselines", "absolute"]
    for table in strong:
        assert rows_by_name(table)["all"]["faults"] == 8  # 2 shapes, 2 kinds of batch, 2 seeds
    for table in strong[:2]:
        assert rows_by_name(table)["all"]["caught in 3 windows [%]"] == 100
    assert rows_by_name(strong[0])["all"]["false alarms"] == 0
    by_fault = rows_by_name(faults)
    assert len(by_fault) == 8
    shares = [by_fault[f"+{logits} logits"]["relative, ever [%]"] for logits in (20, 10, 5, 3, 2, 1)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 100
    assert shares[-1] < 100
    assert by_fault["one dead expert"]["relative, ever [%]"] == 100
    assert by_fault["half of the experts starve"]["relative, ever [%]"] == 100
    for row in family["rows"]:
        assert row["collapse [%]"] <= 5
        assert row["windows with a finding"] == 0


def test_learning_benchmark_compares_a_run_with_its_records():
    (table,) = run_benchmark("learning")["tables"]
    [row] = table["rows"]
    assert row["flushes compared"] == 9 + 3  # of steps 55 to 95 and 105 to 115
    assert row["largest PSI"] > 0
    assert row["largest growth of std"] > 1
    assert row["records"] == 3


def test_memory_benchmark_finds_that_recomputing_keeps_less():
    (table,) = run_benchmark("memory")["tables"]
    for row in table["rows"]:
        assert 0 < row["recomputed [MiB]"] < row["kept [MiB]"]


def test_placement_benchmark_compares_with_eplb_on_every_kind_of_traffic():
    unseen, trades, planning = run_benchmark("placement")["tables"]
    names = [f"{kind}, {ranks} ranks" for kind in ("bundles", "domains", "trained model") for ranks in (4, 8)]
    assert list(rows_by_name(unseen)) == list(rows_by_name(trades)) == names
    for row in unseen["rows"]:
        assert min(row["balance: even"], row["EPLB"], row["planned"]) >= 1
        assert row["aim reached"] in ("yes", "no")
    assert rows_by_name(trades)["bundles, 4 ranks"]["10 % fuller [%]"] > 5
    assert planning["rows"][0]["time [s]"]["median"] > 0
