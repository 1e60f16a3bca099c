"""`equipoise place` on a recorded file, on a run's records, and on a run's text; and what it refuses."""

import json

import numpy as np
import pytest
from tests.commands.running import run_command

from equipoise.monitor.recorder import RoutingSums
from equipoise.monitor.stats import routing_stats
from equipoise.monitor.store import RunStore
from equipoise.plan import read_placements, traffic_of_ids, write_placements
from equipoise.plan.traffic import pairs_of_ids
from equipoise.types import CoSelection, Placement

E, K = 16, 2


def choices(seed, tokens=1600):
    """Pairs of experts that fire together, most of the time."""
    rng = np.random.default_rng(seed)
    order_E = rng.permutation(E)
    first_T = rng.integers(0, E, tokens)
    other_T = np.where(rng.random(tokens) < 0.8, first_T ^ 1, (first_T + 2) % E)
    return order_E[np.stack([first_T, other_T], axis=1)]


@pytest.fixture
def recorded(tmp_path):
    """Two layers in an .npz file, with padding as 255."""
    ids_TLK = np.stack([choices(0), choices(1)], axis=1)
    ids_TLK[::100] = 255
    np.savez(tmp_path / "ids.npz", indices=ids_TLK)
    return tmp_path / "ids.npz"


def record(path, *, pairs):
    """A run folder with 8 flushes of one layer."""
    with RunStore(path) as store:
        for number, ids_TK in enumerate(np.split(choices(0), 8)):
            step, counts_E = 10 * (number + 1), np.bincount(ids_TK.ravel(), minlength=E)
            sums = RoutingSums(len(ids_TK), counts_E, np.full(E, np.nan), *[np.nan] * 4, {}, {})
            store.routing([routing_stats("layers.0.mlp", step, sums)])
            if pairs:
                store.co_selection([CoSelection("layers.0.mlp", step, len(ids_TK), pairs_of_ids(ids_TK, E))])
    return path


def test_a_recorded_file_is_planned_scored_and_written(recorded, tmp_path, capsys):
    out = tmp_path / "placement.json"
    words = (recorded, "--num-experts", E, "--ignore-ids", 255, "--ranks", 4, "--nodes", 2, "--replicas", 20)
    code, said = run_command(capsys, "place", *words, "--out", out, "--json")
    assert code == 0, said.err
    answer = json.loads(said.out)
    assert answer["planned_on"] == "800 tokens in 8 windows"
    assert list(answer["mean"]) == ["even", "EPLB", "planned"]
    assert answer["mean"]["planned"]["fan_out"] < 0.9 * answer["mean"]["EPLB"]["fan_out"]
    assert [layer["layer"] for layer in answer["layers"]] == ["layers.0", "layers.1"]
    assert answer["layers"][1]["scores"]["planned"]["rank_hops"] > 0
    placements = read_placements(out)
    assert [list(map(list, each.slots)) for each in placements.values()] == [each["slots"] for each in answer["layers"]]
    assert all([len(rank) for rank in each.slots] == [5] * 4 for each in placements.values())

    code, said = run_command(capsys, "place", *words, "--from", out, "--move-price", 1)
    assert code == 0, said.err
    assert "earlier" in said.out
    rows = [line.split() for line in said.out.splitlines() if line.split()[:1] == ["planned"]]
    assert [row[-2] for row in rows] == ["0"] * 3  # no move gains so much
    assert "4 ranks on 2 nodes, 5 slots each; planned in" in said.out


def test_the_score_is_that_of_the_second_half(recorded, capsys):
    code, said = run_command(
        capsys, "place", recorded, "--num-experts", E, "--ignore-ids", 255, "--ranks", 4, "--windows", 2, "--json"
    )
    assert code == 0, said.err
    ids_TK = np.where((raw := np.load(recorded)["indices"][800:, 0]) == 255, -1, raw)
    held_out = traffic_of_ids("layers.0", ids_TK, E, 1)
    score = json.loads(said.out)["layers"][0]["scores"]["even"]
    load_R = held_out.load_WE[0].reshape(4, 4).sum(axis=1)
    assert score["balance"] == pytest.approx(load_R.max() / load_R.mean())


def test_a_run_with_pairs_is_planned_from_its_records(tmp_path, capsys):
    run = record(tmp_path / "run", pairs=True)
    code, said = run_command(capsys, "place", run, "--ranks", 4, "--json")
    assert code == 0, said.err
    answer = json.loads(said.out)
    assert (answer["planned_on"], answer["scored_on"]) == ("steps 10 to 40", "steps 50 to 80")
    assert answer["notes"] == []
    assert answer["cluster"]["num_slots"] == E
    assert answer["mean"]["planned"]["fan_out"] < 0.9 * answer["mean"]["even"]["fan_out"]
    assert answer["mean"]["planned"]["rank_hops"] is None


def test_a_run_without_pairs_says_what_is_missing(tmp_path, capsys):
    run = record(tmp_path / "run", pairs=False)
    code, said = run_command(capsys, "place", run, "--ranks", 4, "--slots-per-rank", 5)
    assert code == 0, said.err
    assert "only load was planned" in said.out
    code, said = run_command(capsys, "place", run, "--ranks", 4, "--since", 50, "--json")
    assert json.loads(said.out)["planned_on"] == "steps 50 to 60"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-experts", 16], "expected expert ids of 0 to 15|expected expert ids from 0 to 15"),
        (["--ignore-ids", 255], "num-experts: needed with recorded expert ids"),
        (["--num-experts", 16, "--ignore-ids", 255, "--windows", 1], "windows: expected 2 or more"),
        (["--num-experts", 16, "--ignore-ids", 255, "--replicas", 12], "expected at least one for each of 16 experts"),
        (["--num-experts", 16, "--ignore-ids", 255, "--replicas", 18], "expected a multiple of 4 ranks, got 18"),
        (["--num-experts", 16, "--ignore-ids", 255, "--nodes", 3], "nodes: expected a divisor of 4 ranks, got 3"),
        (["--num-experts", 16, "--ignore-ids", 255, "--slots-per-rank", 17], "68 cannot be filled with 16 experts"),
        (["--replicas", 16, "--slots-per-rank", 4, "--num-experts", 16, "--ignore-ids", 255], "got both"),
    ],
)
def test_mistakes_are_one_line(recorded, capsys, words, message):
    code, said = run_command(capsys, "place", recorded, "--ranks", 4, *words)
    assert code == 2
    assert len(said.err.strip().splitlines()) == 1
    assert any(part in said.err for part in message.split("|")), said.err


def test_no_file_run_or_earlier_placement(tmp_path, recorded, capsys):
    assert "expected a file that ends in" in run_command(capsys, "place", tmp_path / "none", "--ranks", 4)[1].err
    (tmp_path / "empty").mkdir()
    assert "expected a run folder" in run_command(capsys, "place", tmp_path / "empty", "--ranks", 4)[1].err
    run = record(tmp_path / "run", pairs=False)
    assert "at least 2 flushes since step 80" in run_command(capsys, "place", run, "--ranks", 4, "--since", 80)[1].err
    write_placements(tmp_path / "p.json", {"layers.0.mlp": Placement.even(E, 8)})
    said = run_command(capsys, "place", run, "--ranks", 4, "--from", tmp_path / "p.json")[1].err
    assert "earlier placement: layer layers.0.mlp: expected 4 ranks, got 8" in said
    np.savez(tmp_path / "counts.npz", counts=np.ones((2, 4), int))
    assert (
        "expected expert ids, got counts" in run_command(capsys, "place", tmp_path / "counts.npz", "--ranks", 2)[1].err
    )
    np.savez(tmp_path / "gaps.npz", indices=np.array([[[0, -1]]] * 40))
    said = run_command(capsys, "place", tmp_path / "gaps.npz", "--ranks", 2, "--num-experts", 4)[1].err
    assert "pass ids that mark padding as --ignore-ids" in said
