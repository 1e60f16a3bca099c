"""A run over ranks repairs itself as one process does: the same alerts, repairs and weights; nothing half done."""

import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from tests.parallel.repairs import END, LAYER, TRAINED, ask, config, story, train
from tests.ranks import run_ranks

from equipoise.disk.checkpoint import list_checkpoints, load_checkpoint
from equipoise.parallel import ParallelConfig, Ranks
from equipoise.recovery.catalogue import REPAIRS
from equipoise.recovery.known_good import KnownGood
from equipoise.train.spread import check_ranks

WORKER = Path(__file__).with_name("repair_worker.py")
WORLDS = (2, 4)
RANKS = pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The same run, broken in the same way, on one process and on ranks."""
    folder = tmp_path_factory.mktemp("repairs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks: the bits of a sum depend on it
    healthy = train(folder)
    for world in (1, *WORLDS):
        shutil.copytree(healthy, folder / f"run-{world}")
        ask(folder / f"run-{world}")
    alone, trainer = story(folder / "run-1", None)
    trainer.close("interrupted")
    (folder / "1.0.json").write_text(json.dumps(alone))
    torch.set_num_threads(threads)
    return folder


def told(folder: Path, world: int, rank: int = 0) -> dict:
    """What a rank did, before the last one dies."""
    if not (folder / f"{world}.0.json").exists():
        run_ranks(WORKER, folder, world)
    return json.loads((folder / f"{world}.{rank}.json").read_text())


def test_one_process_finds_and_repairs_what_was_put_in(folder):
    """What the others are compared with."""
    actions = [(kind, layer, state) for _, kind, layer, state in told(folder, 1)["actions"]]
    assert actions[0] == ("quantile_bias", LAYER, "kept")
    assert actions[-1] == ("reseed", LAYER, "kept")
    assert [TRAINED + 6, f"{LAYER}:collapse", "firing"] in told(folder, 1)["alerts"]
    assert [TRAINED + 10, f"{LAYER}:collapse", "resolved"] in told(folder, 1)["alerts"]


@RANKS
def test_ranks_find_and_repair_the_same_at_the_same_steps(world, folder):
    alone, many = told(folder, 1), told(folder, world)
    assert many["alerts"] == alone["alerts"]
    assert many["actions"] == alone["actions"]
    losses, wanted = (dict(map(tuple, each["losses"])) for each in (many, alone))
    assert losses.keys() == wanted.keys()
    for step, loss in losses.items():
        assert loss == pytest.approx(wanted[step], rel=1e-4, nan_ok=True), step
    for rank in range(world):
        assert told(folder, world, rank)["mode"] == many["mode"]
        assert told(folder, world, rank)["on_trial"] == "quantile_bias"  # after a resume in the middle of it
        assert told(folder, world, rank)["finite"]


@RANKS
def test_the_healed_weights_are_those_of_one_process(world, folder):
    alone, many = (load_checkpoint(list_checkpoints(folder / f"run-{each}" / "checkpoints")[-1]) for each in (1, world))
    assert many.step == alone.step > TRAINED
    for name, value in alone.tensors["model"].items():
        torch.testing.assert_close(
            many.tensors["model"][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_repair_is_done_and_undone_to_the_bit_on_every_rank(world, folder):
    for rank in range(world):
        undone = told(folder, world, rank)["undone"]
        assert undone == {kind: ["", True, True] for kind in REPAIRS}, (rank, undone)


@RANKS
def test_what_one_rank_can_not_do_no_rank_does(world, folder):
    """The last one has no stand-in for its experts. All learn why, and nothing is left of it."""
    for rank in range(world):
        problem, clean = told(folder, world, rank)["failed"]
        assert problem.startswith(f"rank {world - 1}: Mode: nothing can stand in for the experts")
        assert clean
    assert told(folder, 1)["failed"] == ["", True]


@RANKS
def test_a_healthy_checkpoint_of_ranks_is_known_to_be_good(world, folder):
    alone, many = KnownGood(folder / "run-1"), KnownGood(folder / f"run-{world}")
    assert [record.step for record in many.records] == [record.step for record in alone.records]


@RANKS
def test_a_rank_that_dies_in_a_repair_ends_the_others_at_once(world, folder):
    told(folder, world)
    for rank in range(world - 1):
        error = (folder / f"{world}.{rank}.lost").read_text()
        assert re.match(rf"step {END + 3}: rank {rank}, .*did not end", error)


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_rank_has_the_other_faults_and_is_rid_of_them(world, folder):
    for rank in range(world):
        there = ["NaNExpert", "SlowRank", "SlowExpert", "StaleCounters", "SkewedInput"]
        assert told(folder, world, rank)["faults"] == [there, []]


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_without_leave_to_repair_all_ranks_end_and_name_the_one(world, folder):
    """Its own weights are finite on rank 0: it would wait for rank 1 for ever."""
    where = "" if world == 1 else "rank 1: "
    for rank in range(world):
        error = told(folder, world, rank)["diverged"]
        assert error.startswith(f"step {END + 2}: the weights are not finite after the update")
        assert f"First not finite: {where}parameter {LAYER}.experts.down_proj (1 of " in error


@pytest.mark.parametrize("name", ["recover", "accept_faults"])
def test_sharded_routers_are_not_repaired(name, tmp_path):
    others = {field.name: None for field in fields(Ranks)} | {"config": ParallelConfig(data=2, shard=True)}
    asked = replace(config(tmp_path), recover=False, accept_faults=False)
    with pytest.raises(ValueError, match=rf"{name}: expected False with parallel.shard: no rank holds a whole router"):
        check_ranks(replace(asked, **{name: True}), Ranks(**others))


@RANKS
def test_ranks_do_a_thing_together_or_not_at_all(world, folder):
    for rank in range(world):
        words = told(folder, world, rank)["words"]
        assert words["main"] == {"from": 0, "a": [1.5, None, "é"]}
        assert words["rows"] == [[float(each)] * 2 for each in range(world) for _ in range(each)]
        assert words["same"] == [0.0, 0.0]
        assert words["all"] == [rank, ""]
        assert words["none"] == [None, "not on 0"]
        assert words["one"] == [None, "rank 1: not on 1"]
        assert words["differs"] == [None, "rank 1 came to something else than rank 0; it was undone on all ranks"]
        kind, text = words["unforeseen"]
        assert kind == ("KeyError" if rank == 1 else "CollectiveError")
        assert "not on 1" in text
        assert words["undone"] == ([rank] if rank == 1 else [rank] * 3)
