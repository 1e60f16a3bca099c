"""One rank of tests/monitor/test_transformers_ranks.py: FOLDER WORLD RANK."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tests.monitor.transformers_models import Witness, batch, build
from tests.ranks import process_group
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import equipoise as eq

FAMILIES = ("Mixtral", "Qwen3Moe")
WRAPS = ("ddp", "fsdp2")


def ddp(model):
    return DistributedDataParallel(model)


def fsdp2(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def batches(rank):
    """A batch per step: lengths and paddings differ between ranks, and in the second step one rank has only padding."""
    tokens, mask = batch(B=3, S=7 + 2 * rank, pad="left" if rank else "right")
    return [(tokens, mask), (tokens, mask * (rank != 1)), (tokens.flip(1), mask.flip(1))]


def run(family, wrap, attach_first, rank):
    calls = []

    def reduce(tensor):
        calls.append(tensor.numel())
        dist.all_reduce(tensor)

    model = build(family).train()
    witness = Witness(model)
    eye = eq.watch(model, every=3, reduce=reduce) if attach_first else None
    model = {"ddp": ddp, "fsdp2": fsdp2}[wrap](model)
    eye = eye or eq.watch(model, every=3, reduce=reduce)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step, (tokens, mask) in enumerate(batches(rank), start=1):
        logits = model(input_ids=tokens, attention_mask=mask).logits
        (logits * mask[..., None]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        eye.step(step)
    real = [mask.flatten().tolist() for _, mask in batches(rank)]
    seen = {stats.layer.removeprefix("module."): (stats.num_tokens, stats.counts_E.tolist()) for stats in eye.stats()}
    own = {layer: (sum(map(sum, real)), witness.counts(layer, real)) for layer in witness.ids}
    eye.detach()
    return {"seen": seen, "own": own, "calls": len(calls)}


def main(folder: Path, world: int, rank: int) -> None:
    with process_group(folder / "meet", rank, world):
        results = {
            f"{family} {wrap} {order}": run(family, wrap, order == "watch first", rank)
            for family in FAMILIES
            for wrap in WRAPS
            for order in ("watch first", "wrap first")
        }
        torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
