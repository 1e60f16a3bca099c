"""The demonstration for real, in its quick form: a collapse is injected, found, repaired, and the files are there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise.demo import DemoResult
from equipoise.disk.checkpoint import load_checkpoint
from equipoise.monitor.incidents import repairs
from equipoise.monitor.store import RunStore


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "equipoise", "demo", "--quick", "--json", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_it_names_the_layer_and_the_expert_that_were_broken(result):
    assert result["caught_and_repaired"] is True
    assert result["layer"] == "layers.1.mlp"
    with RunStore.open_readonly(Path(result["out"])) as store:
        alerts = [a for a in store.alerts() if a.step > result["injected_at"] and a.finding.rule == "collapse"]
    assert {(a.finding.layer, a.finding.expert) for a in alerts} == {("layers.1.mlp", result["expert"])}
    assert [a.state for a in alerts] == ["firing", "resolved"]


def test_it_is_detected_within_a_few_flushes_of_five_steps(result):
    assert result["injected_at"] < result["detected_at"] <= result["injected_at"] + 3 * 5


def test_the_repair_brings_the_load_of_that_layer_back(result):
    with RunStore.open_readonly(Path(result["out"])) as store:
        history = store.routing_history(result["layer"])
        made = [action for action in repairs(store.actions()) if action.step > result["injected_at"]]
    before = [s for s in history if s.step <= result["injected_at"]][-1]
    broken = next(s for s in history if s.step == result["detected_at"])
    assert broken.max_token_share > 0.9 > before.max_token_share
    assert history[-1].max_violation < 1.0
    assert [(a.kind, a.layer, a.state) for a in made] == [("quantile_bias", result["layer"], "kept")]
    assert result["repair"] == "quantile_bias"


def test_every_rung_of_the_ladder_is_tried(result):
    ladder = {rung["repair"]: rung for rung in result["ladder"]}
    rungs = ["as it is", "quantile_bias", "next_choice", "spill", "router_rollback", "full_rollback", "round_robin"]
    assert list(ladder) == rungs
    assert ladder["as it is"]["straggler"] > 3.9  # one of 8 experts takes all tokens at top-2: 4 fair loads
    assert all(ladder[rung]["straggler"] < 2.5 for rung in rungs[1:])
    assert ladder["next_choice"]["straggler"] == ladder["spill"]["straggler"] == 1.25
    assert ladder["full_rollback"]["perplexity"] == pytest.approx(ladder["router_rollback"]["perplexity"], rel=0.02)


def test_perplexity_suffers_and_recovers(result):
    assert result["perplexity_broken"] > result["perplexity_before"]
    assert result["perplexity_after"] < result["perplexity_broken"]


def test_it_leaves_a_whole_checkpoint_a_picture_and_a_sample(result):
    assert load_checkpoint(Path(result["checkpoint"])).step == 120
    assert Path(result["picture"]).read_bytes().startswith(b"\x89PNG")
    assert result["sample"].startswith("In the beginning")
    assert len(result["sample"]) > 40


def test_an_unrepaired_collapse_is_not_called_a_success(result):
    fields = {name: value for name, value in result.items() if name != "caught_and_repaired"}
    assert not DemoResult(**fields | {"resolved_at": None}).caught_and_repaired
    assert DemoResult(**fields | {"resolved_at": None}).summary().startswith("NOT REPAIRED")
    assert not DemoResult(**fields | {"detected_at": None}).caught_and_repaired
