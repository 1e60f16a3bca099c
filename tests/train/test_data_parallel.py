"""One, two and four processes with their shares of one batch: the same gradient, the same balancers, real gloo."""

from pathlib import Path

import pytest
import torch
from tests.ranks import run_ranks

ROUTER = "layers.0.mlp.router.weight"
WORKER = Path(__file__).with_name("data_parallel_worker.py")
WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, dict[str, dict[str, torch.Tensor]]]:
    """By number of processes and case: what rank 0 ends with. They meet through a file and talk on loopback."""
    folder = tmp_path_factory.mktemp("ranks")
    for world in WORLDS:
        run_ranks(WORKER, folder, world)
    return {world: torch.load(folder / f"{world}.pt", weights_only=True) for world in WORLDS}


@pytest.mark.parametrize("case", ["global", "sequence", "quantile"])
def test_any_number_of_processes_gives_the_same_gradient(case, results):
    whole = results[1][case]
    assert whole[ROUTER].abs().max() > 1e-4
    for world in (2, 4):
        assert results[world][case].keys() == whole.keys()
        for name, value in whole.items():
            scale = float(value.abs().max())
            actual = results[world][case][name]
            torch.testing.assert_close(actual, value, rtol=1e-5, atol=2e-6 * scale, msg=f"{world} {name}")


def test_micro_scope_is_not_the_same(results):
    """What the test above would find if a scope were not what its name says."""
    whole, split = results[1]["micro"][ROUTER], results[4]["micro"][ROUTER]
    assert (whole - split).abs().max() > 1e-3 * whole.abs().max()
