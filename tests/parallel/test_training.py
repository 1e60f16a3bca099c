"""Real processes train as one does: losses, gradients, their norm, balancers and weights, for every router."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.parallel.cases import CASES, losses_alone, names_for, train_alone
from tests.ranks import run_ranks

WORKER = Path(__file__).with_name("worker.py")
WORLDS = (1, 2, 4)


def run_all(folder: Path, every: bool) -> Path:
    for world in WORLDS:
        run_ranks(WORKER, folder, world, "every" if every else "some")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return run_all(tmp_path_factory.mktemp("ranks"), every=False)


alone = cache(lambda name: train_alone(CASES[name]))


RUNS = [(name, world) for world in WORLDS for name in names_for(world, every=False)]


@pytest.mark.parametrize(("name", "world"), RUNS)
def test_ranks_train_as_one_process_does(name, world, folder):
    compare(name, world, folder)


@pytest.mark.slow
def test_every_case_with_every_number_of_ranks(tmp_path):
    run_all(tmp_path, every=True)
    for world in WORLDS:
        for name in names_for(world, every=True):
            compare(name, world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4, 8])
def test_two_hundred_steps_have_the_same_losses(world, tmp_path):
    """Each rank has one part of the batch, eight of them in two expert groups. The loss itself is taken in fp32."""
    run_ranks(Path(__file__).with_name("long_worker.py"), tmp_path, world, "200")
    losses = json.loads((tmp_path / f"{world}.json").read_text())
    expected = losses_alone(CASES["balanced, all_to_all"], 200, world)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]


def compare(name: str, world: int, folder: Path) -> None:
    expected = alone(name)
    for rank in range(world):
        actual = load_file(folder / f"{name}.{world}.{rank}.safetensors")
        note = load_file(folder / f"{name}.{world}.{rank}.note.safetensors")
        slots = {key.removeprefix("slots."): value for key, value in note.items() if key.startswith("slots.")}
        assert set(actual) == set(expected)
        for key, value in expected.items():
            layer = next((layer for layer in slots if f"{layer}.experts." in key), None)
            if layer is not None and key.startswith("grad.1.") and CASES[name].move_to is not None:
                continue  # of the experts that the rank had then
            wanted = value if layer is None else value[slots[layer]]
            scale = float(value.abs().max())  # the loss is taken in fp32, also of a model in fp64
            close = {"rtol": 1e-6, "atol": 1e-6 * scale + 1e-12}
            torch.testing.assert_close(actual[key], wanted, **close, msg=lambda m, k=key: f"{k}: {m}")


def test_experts_that_move_leave_the_output_as_it_was(folder):
    """To the bit: at top-2 a sum of two is the same in any order. Replicas see other batches, so only nearly."""
    for rank in range(4):
        note = load_file(folder / f"moved.4.{rank}.note.safetensors")
        assert bool(note["same_bits"])
        assert note["slots.layers.0.mlp"].tolist() == [e for e in reversed(range(6)) if (e + 1) % 4 == rank]
