"""Real processes train as one does: losses, gradients, their norm, balancers and weights, for every router."""

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.parallel.cases import CASES, train_alone
from tests.parallel.conftest import run_ranks

WORKER = Path(__file__).with_name("worker.py")
WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for world in WORLDS:
        run_ranks(WORKER, folder, world)
    return folder


alone = cache(lambda name: train_alone(CASES[name]))


RUNS = [(name, world) for name in CASES for world in WORLDS if CASES[name].parallel.get("nodes", 1) <= world]


@pytest.mark.parametrize(("name", "world"), RUNS)
def test_ranks_train_as_one_process_does(name, world, folder):
    expected = alone(name)
    for rank in range(world):
        actual = load_file(folder / f"{name}.{world}.{rank}.safetensors")
        slots = {key.removeprefix("slots."): value for key, value in actual.items() if key.startswith("slots.")}
        assert set(actual) - {f"slots.{layer}" for layer in slots} == set(expected)
        for key, value in expected.items():
            layer = next((layer for layer in slots if f"{layer}.experts." in key), None)
            wanted = value if layer is None else value[slots[layer]]
            scale = float(value.abs().max())  # the loss is taken in fp32, also of a model in fp64
            close = {"rtol": 1e-6, "atol": 1e-6 * scale + 1e-12}
            torch.testing.assert_close(actual[key], wanted, **close, msg=lambda m, k=key: f"{k}: {m}")
