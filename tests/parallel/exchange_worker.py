"""One rank of tests/parallel/test_exchange.py: FOLDER WORLD RANK. Forwards one layer over every way to spread it."""

import json
import sys
from pathlib import Path

import torch
from tests.ranks import process_group

from equipoise.layer import MoE
from equipoise.parallel import ParallelConfig, apply_expert_parallel, make_ranks
from equipoise.routing import TopK

T, D, E = 40, 64, 16
WAYS = {
    "as it is": {"dispatcher": "all_to_all"},
    "gathered": {"dispatcher": "all_gather"},
    "two nodes": {"dispatcher": "all_to_all", "nodes": 2},
    "bf16": {"dispatcher": "all_to_all", "payload": "bf16"},
    "int8": {"dispatcher": "all_to_all", "payload": "int8"},
    "fp8": {"dispatcher": "all_to_all", "payload": "fp8"},
    "fp8, two nodes": {"dispatcher": "all_to_all", "payload": "fp8", "nodes": 2},
    "bf16, gathered": {"dispatcher": "all_gather", "payload": "bf16"},
}


def layer(router: TopK) -> MoE:
    torch.manual_seed(0)
    moe = MoE(D, 32, E, router=router)
    moe.init_weights(0.3, 0.3)
    return moe


def tokens(rank: int) -> torch.Tensor:
    """Rank 1 has none."""
    return torch.randn(0 if rank == 1 else T, D, generator=torch.Generator().manual_seed(rank)).requires_grad_()


def outcome(way: dict, world: int, rank: int, router: TopK) -> dict:
    moe, x = layer(router), tokens(rank)
    ranks = make_ranks(ParallelConfig(expert=world, **way))
    parallel = apply_expert_parallel(moe, ranks)
    y = moe(x)
    sent = parallel.meters[""].sent_bytes
    y.square().sum().backward()
    alone, x_alone = layer(router), tokens(rank)
    expected = alone(x_alone)
    expected.square().sum().backward()
    difference = (y - expected).abs().max() / expected.abs().max() if len(x) else torch.zeros(())
    grad = (x.grad - x_alone.grad).abs().max() / x_alone.grad.abs().max() if len(x) else torch.zeros(())
    ids_TK = alone.router(x_alone).expert_ids_N.view(-1, router.k)
    return {"sent": sent, "error": float(difference), "grad_error": float(grad), "ids": ids_TK.tolist()}


def main(folder: Path, world: int, rank: int) -> None:
    with process_group(folder / "meet", rank, world):
        wide = TopK(k=6)
        limited = TopK(k=2, num_groups=2, top_groups=1, score="sigmoid")  # experts of one half only: one node
        told = {name: outcome(way, world, rank, wide) for name, way in WAYS.items()}
        told["two nodes, limited"] = outcome(WAYS["two nodes"], world, rank, limited)
        (folder / f"{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
