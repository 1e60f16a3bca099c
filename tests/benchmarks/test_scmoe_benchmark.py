"""The benchmark of the shortcut runs, compares arms of the same arithmetic, and goes on where it stopped."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.scmoe import ARMS, BASELINE, MARGIN, Outcome, flops_per_token, quality_row, verdict

from equipoise.models.parameters import parameter_counts
from equipoise.train.recipes import recipe

ROOT = Path(__file__).parents[2]


def run_benchmark(out, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "benchmarks.scmoe", "--smoke", "--json", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_compares_every_arm_and_goes_on(tmp_path):
    (table,) = run_benchmark(tmp_path)["tables"]
    rows = {row["per token"]: row for row in table["rows"]}
    assert list(rows) == list(ARMS)
    assert len({row["forward [kFLOP]"] for row in rows.values()}) == 1
    assert all(0 < row["loss [nats]"] < 1.1 * math.log(512) for row in rows.values())
    row = rows["ScMoE pos2"]
    assert row["low"] < row["- top-2 [mnat]"] < row["high"]
    assert 1e-3 * row["- top-2 [mnat]"] == pytest.approx(row["loss [nats]"] - rows[BASELINE]["loss [nats]"], abs=1e-5)

    records = {path: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    configs = {path: record["config"] for path, record in records.items()}
    by_run = {(config["name"].split(", ")[1], config["seed"]): path for path, config in configs.items()}
    kept, other = by_run["ScMoE pos2", 1], by_run[BASELINE, 0]
    record = records[kept]
    kept.write_text(json.dumps(record | {"loss": record["loss"] + 1}))  # would be seen if it were run again
    other.write_text(json.dumps(records[other] | {"config": {}, "loss": 99.0}))  # is run again
    (again,) = run_benchmark(tmp_path, "--arms", "ScMoE pos2")["tables"]
    losses = {row["per token"]: row["loss [nats]"] for row in again["rows"]}
    assert list(losses) == [BASELINE, "ScMoE pos2"]
    assert losses["ScMoE pos2"] == pytest.approx(row["loss [nats]"] + 0.5)
    assert losses[BASELINE] == pytest.approx(rows[BASELINE]["loss [nats]"])


def test_arms_have_the_same_arithmetic_and_say_so_by_hand():
    configs = {name: arm.of(recipe("tiny_scmoe")) for name, arm in ARMS.items()}
    # D=64, 4 heads and 2 key/value heads of 16, 4 layers; 64 tokens, of which the unfused product computes all pairs
    attention = 4 * 2 * (64 * (64 + 32 + 32) + 64 * 64 + 2 * 64 * 64)
    dense, experts, router = 2 * 2 * 3 * 64 * 128, 2 * 2 * 2 * 3 * 64 * 64, 2 * 2 * 64 * 8
    for config in configs.values():
        assert flops_per_token(config.model, 64) == attention + dense + experts + router + 2 * 64 * 512
    assert len({parameter_counts(config.model).active for config in configs.values()}) == 1
    three = replace(ARMS[BASELINE], routed=3).of(recipe("tiny_scmoe"))
    assert flops_per_token(three.model) > flops_per_token(configs[BASELINE].model)


def test_difference_by_hand():
    # differences 0.01 and 0.03: mean 0.02, standard error 0.01, t of one degree 12.706
    ours, theirs = [Outcome(5.01, 0.0, 1.0), Outcome(5.03, 1.0, 1.0)], [Outcome(5.0, 0.0, 1.0), Outcome(5.0, 0.0, 1.0)]
    row = quality_row("ScMoE pos1", 2000.0, ours, theirs)
    assert row == ("ScMoE pos1", 2.0, pytest.approx(5.02), 0.5, 20.0, -107.06, 147.06, "open")
    assert quality_row(BASELINE, 2000.0, theirs, theirs)[4:] == (None, None, None, None)
    assert quality_row("ScMoE pos1", 2000.0, ours[:1], theirs[:1])[5:] == (None, None, "open")  # one seed tells nothing


def test_verdict():
    assert verdict(-0.5, 0.9 * MARGIN) == "not worse"
    assert verdict(1.1 * MARGIN, 0.5) == "worse"
    assert verdict(-0.5, 1.1 * MARGIN) == "open"
