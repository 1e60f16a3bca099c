"""`equipoise simulate` as a command: designs side by side, files in and out, a stop, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tests.commands.running import run_command

from equipoise.plan.links import Cost, Links
from equipoise.plan.placement_file import write_placements
from equipoise.types import Placement

ROOT = Path(__file__).parents[2]
SMALL = ("--num-experts", 8, "--ranks", 4, "--num-layers", 2, "--qps", 5000, "--seconds", 0.1)


@pytest.fixture
def run(capsys):
    return partial(run_command, capsys, "simulate")


@pytest.fixture
def links(tmp_path):
    line = Cost(1e-4, 1e8)
    found = Links(
        ranks=4,
        backend="gloo",
        device="cpu",
        all_to_all=line,
        all_gather=line,
        reduce_scatter=line,
        all_reduce=line,
        barrier_s=1e-4,
        expert=Cost(1e-4, 1e13),
        dim=512,
        hidden_dim=1024,
    )
    path = tmp_path / "links.json"
    path.write_text(json.dumps(found.fields()))
    return path


def designs(said):
    return {design["design"]: design for design in json.loads(said.out)["designs"]}


def test_flat_stands_beside_two_tiers(run, tmp_path):
    code, said = run(*SMALL, "--json", "--picture", tmp_path / "fleet.png")
    assert code == 0
    found = designs(said)
    assert list(found) == ["flat", "rank per token", "rank per query"]
    assert found["flat"]["copies_per_token"] > found["rank per token"]["copies_per_token"] > 0
    assert found["rank per query"]["link_load_R"] == [0.0] * 4
    assert len({design["arrived"] for design in found.values()}) == 1
    for design in found.values():
        assert design["arrived"] == design["served"] + design["in_flight"] + design["rejected"]
    assert (tmp_path / "fleet.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_what_was_asked_for(run):
    code, said = run(*SMALL)
    assert code == 0
    for name in (
        "latency p50",
        "latency p99",
        "queue, mean",
        "busiest link",
        "spilled to the shared expert",
        "dropped",
    ):
        assert name in said.out


def test_groups_of_ranks_and_no_groups(run):
    assert list(designs(run(*SMALL, "--json", "--groups", 2)[1])) == ["flat", "2 ranks per token", "2 ranks per query"]
    assert list(designs(run(*SMALL, "--json", "--groups", 1)[1])) == ["flat"]
    # top-4 of 8 experts on 4 ranks: no rank has 4 of them, two have
    assert "2 ranks per token" in designs(run(*SMALL, "--json", "--top-k", 4)[1])


def test_a_seed_is_a_result(run):
    first, again, other = (run(*SMALL, "--json", "--seed", seed)[1].out for seed in (0, 0, 1))
    assert first == again != other


def test_measured_links_take_over(run, links):
    slow, fast = (designs(run(*SMALL, "--json", *more)[1])["flat"] for more in (("--links", links), ()))
    assert slow["latency"]["p50"] > fast["latency"]["p50"] + 2 * 3e-4  # 2 layers of 3 exchanges of 1e-4 s
    said = run(*SMALL, "--links", links)[1].out
    assert "measured an expert of 512 x 1024, the model's is 2048 x 1024" in " ".join(said.split())


def test_a_trace_brings_its_layers_and_its_k(run, tmp_path):
    np.save(tmp_path / "trace.npy", np.full((20, 3, 1), 7))  # 3 layers of top-1, all to expert 7
    found = designs(run(*SMALL, "--trace", tmp_path / "trace.npy", "--capacity", "None", "--json")[1])
    assert list(found) == ["flat"]
    assert found["flat"]["busy_R"][:3] == [0, 0, 0] != found["flat"]["busy_R"][3]


def test_a_placement_stands_beside_consecutive_experts(run, tmp_path):
    path, placement = tmp_path / "placement.json", Placement(((0, 4), (1, 5), (2, 6), (3, 7)))
    write_placements(path, {f"layers.{n}.mlp": placement for n in range(2)})
    assert list(designs(run(*SMALL, "--placement", path, "--json")[1])) == ["flat", "placed"]


def test_too_much_traffic_is_said(run):
    _, said = run(*SMALL, "--qps", 200_000, "--max-batch", 1)
    assert "the queue grows" in said.out


def test_ctrl_c_shows_what_there_is():
    command = [sys.executable, "-m", "equipoise", "simulate", "--seconds", "1000", "--qps", "1000", "--num-layers", "1"]
    command += ["--json", "--picture", "/dev/null"]
    code = """if True:
        import os, runpy, signal, sys, threading, time
        before = signal.getsignal(signal.SIGINT)
        def press():
            while signal.getsignal(signal.SIGINT) is before:  # until the simulation listens
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=press, daemon=True).start()
        sys.argv = sys.argv[3:]
        runpy.run_module("equipoise", run_name="__main__")
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", code, *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    said = json.loads(done.stdout)
    assert said["signal"] == signal.SIGINT
    (flat,) = said["designs"]
    assert 0 < flat["seconds"] < 1000
    assert flat["arrived"] == flat["served"] + flat["in_flight"] + flat["rejected"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--groups", 3), "groups: expected a divisor of 4 ranks and of 8 experts, got 3"),
        (("--qps", 0), "qps: expected a number above 0, got 0.0"),
        (("--skew", -1), "skew: expected an exponent of at least 0, got -1.0"),
        (("--top-k", 9), "top_k: expected at most the 8 experts, got 9"),
        (("--ranks", 0), "ranks: expected at least 1, got 0"),
        (("--link-gb-s", 0), "Cost: expected start_s of at least 0 seconds and a rate above 0"),
        (("--links", "missing.json"), "missing.json: there is no such file"),
        (("--links", "broken.json"), "broken.json: expected JSON, but it cannot be read"),
        (("--links", "other.json"), "other.json: expected the links that `equipoise bench links --out` writes"),
        (("--placement", "other.json"), "other.json: expected a file with format 'equipoise placement'"),
        (("--trace", "counts.npz"), "counts.npz: expected the expert ids of tokens, got counts"),
    ],
)
def test_mistakes_are_named(run, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"a": 1}')
    np.savez(tmp_path / "counts.npz", counts=np.ones((2, 8), dtype=np.int64), num_tokens=np.array(4))
    code, said = run(*SMALL, *words)
    assert code == 2
    assert says in " ".join(said.err.replace("│", " ").split())  # in a box, wrapped
