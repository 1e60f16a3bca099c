"""Models of transformers on two data-parallel ranks, real gloo: each rank's watch tells what both have routed."""

from pathlib import Path

import pytest
import torch
from tests.ranks import run_ranks

WORKER = Path(__file__).with_name("transformers_ranks_worker.py")
WORLD = 2
NUM_TOKENS = [15 + 15 + 15, 21 + 0 + 21]  # by rank: three batches without their padding; rank 1's second is all padding


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By rank: what its watch says, and what a plain observer saw on it alone."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(WORKER, folder, WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("order", ["watch first", "wrap first"])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_counts_are_those_of_all_ranks(family, wrap, order, results):
    """One rank has nothing but padding in the second step."""
    one, two = (rank[f"{family} {wrap} {order}"] for rank in results)
    assert one["seen"] == two["seen"]
    assert one["seen"].keys() == one["own"].keys() == {"model.layers.0.mlp", "model.layers.1.mlp"}
    for layer, (num_tokens, counts) in one["seen"].items():
        assert [rank["own"][layer][0] for rank in (one, two)] == NUM_TOKENS
        assert num_tokens == sum(NUM_TOKENS)
        assert counts == [a + b for a, b in zip(one["own"][layer][1], two["own"][layer][1], strict=True)]


def test_one_reduction_per_flush(results):
    assert {case["calls"] for rank in results for case in rank.values()} == {1}
