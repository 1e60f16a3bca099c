"""A run over ranks repairs itself as one process does: the same alerts, repairs and weights; nothing half done."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.parallel.conftest import run_ranks
from tests.parallel.repairs import LAYER, TRAINED, ask, story, train

from equipoise.disk.checkpoint import list_checkpoints, load_checkpoint
from equipoise.recovery.catalogue import REPAIRS
from equipoise.recovery.known_good import KnownGood

WORKER = Path(__file__).with_name("repair_worker.py")
WORLDS = (2, 4)


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
    (folder / "1.0.json").write_text(json.dumps(story(folder / "run-1", None)))
    torch.set_num_threads(threads)
    for world in WORLDS:
        run_ranks(WORKER, folder, world)
    return folder


def told(folder: Path, world: int, rank: int = 0) -> dict:
    return json.loads((folder / f"{world}.{rank}.json").read_text())


def test_one_process_finds_and_repairs_what_was_put_in(folder):
    """What the others are compared with."""
    actions = [(kind, layer, state) for _, kind, layer, state in told(folder, 1)["actions"]]
    assert actions[0] == ("quantile_bias", LAYER, "kept")
    assert actions[-1] == ("reseed", LAYER, "kept")
    assert [TRAINED + 6, f"{LAYER}:collapse", "firing"] in told(folder, 1)["alerts"]
    assert [TRAINED + 10, f"{LAYER}:collapse", "resolved"] in told(folder, 1)["alerts"]


@pytest.mark.parametrize("world", WORLDS)
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
        assert told(folder, world, rank)["finite"]


@pytest.mark.parametrize("world", WORLDS)
def test_the_healed_weights_are_those_of_one_process(world, folder):
    alone, many = (load_checkpoint(list_checkpoints(folder / f"run-{each}" / "checkpoints")[-1]) for each in (1, world))
    assert many.step == alone.step > TRAINED
    for name, value in alone.tensors["model"].items():
        torch.testing.assert_close(
            many.tensors["model"][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("world", [1, *WORLDS])
def test_every_repair_is_done_and_undone_to_the_bit_on_every_rank(world, folder):
    for rank in range(world):
        undone = told(folder, world, rank)["undone"]
        assert undone == {kind: ["", True, True] for kind in REPAIRS}, (rank, undone)


@pytest.mark.parametrize("world", WORLDS)
def test_what_one_rank_can_not_do_no_rank_does(world, folder):
    """The last one has no stand-in for its experts. All learn why, and nothing is left of it."""
    for rank in range(world):
        problem, clean = told(folder, world, rank)["failed"]
        assert problem.startswith(f"rank {world - 1}: Mode: nothing can stand in for the experts")
        assert clean
    assert told(folder, 1)["failed"] == ["", True]


@pytest.mark.parametrize("world", WORLDS)
def test_a_healthy_checkpoint_of_ranks_is_known_to_be_good(world, folder):
    alone, many = KnownGood(folder / "run-1"), KnownGood(folder / f"run-{world}")
    assert [record.step for record in many.records] == [record.step for record in alone.records]


def test_a_rank_that_dies_in_a_repair_ends_the_others_at_once(tmp_path, folder):
    shutil.copytree(folder / "healthy", tmp_path / "run-2")
    ask(tmp_path / "run-2")
    with pytest.raises(AssertionError, match=r"CollectiveError: step \d+: rank 0, .*did not end"):
        run_ranks(WORKER, tmp_path, 2, "die", timeout=60)
