"""The benchmarks of ranks run, in namespaces and over loopback; the models have the FLOPs that are said."""

import json
import subprocess
import sys

import pytest
from benchmarks.netns import unusable
from benchmarks.scmoe_speed import NAMES, SMOKE, active_flops


@pytest.mark.skipif(unusable() is not None, reason=str(unusable()))
def test_it_measures_every_model_over_a_slow_link():
    command = [sys.executable, "-m", "benchmarks.scmoe_speed", "--smoke", "--json", "--rates", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for table in report["tables"]:
        [row] = table["rows"]
        assert row["link [Mbit/s]"] == "20"
        assert 0 < row["communication [%]"]["median"] < 100
        assert all(row[f"{name} / top-2"]["median"] > 0 for name in NAMES[1:])


def test_the_models_have_the_same_active_flops():
    """But for the second routed expert's router, all of it."""
    flops = {name: active_flops(name, SMOKE) for name in NAMES}
    assert len(set(flops.values())) == 1


def test_every_way_to_the_experts_is_measured():
    command = [sys.executable, "-m", "benchmarks.dispatchers", "--smoke", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    [row] = json.loads(done.stdout)["tables"][0]["rows"]
    assert row["all_to_all [ms]"]["median"] > 0
    assert len(row) == 4
