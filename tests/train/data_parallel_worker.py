"""One rank of tests/train/test_data_parallel.py: FOLDER WORLD RANK."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tests.ranks import process_group

from equipoise.layer import reduce_and_update
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.monitor.recorder import Recorder
from equipoise.routing import BiasBalance, QuantileBalance, SwitchLoss, TopK, ZLoss
from equipoise.train.data import IGNORE, Batch
from equipoise.train.step import gradients, split

CASES = {
    "global": (SwitchLoss(0.5, "global"), ZLoss(0.1), BiasBalance()),
    "sequence": (SwitchLoss(0.5, "sequence"), ZLoss(0.1), BiasBalance(rule="smooth")),
    "quantile": (SwitchLoss(0.5, "global"), QuantileBalance()),
    "micro": (SwitchLoss(0.5, "micro"),),
}
B, S = 8, 16


def whole_batch() -> Batch:
    tokens = torch.randint(0, 61, (B, S + 1), generator=torch.Generator().manual_seed(2))
    targets = tokens[:, 1:].clone()
    targets.view(-1)[:40] = IGNORE  # all in the first sequences: ranks with unequal numbers of targets
    return Batch(tokens[:, :-1].contiguous(), targets, torch.zeros_like(targets))


def run(case: str, world: int, rank: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    moe = MoEConfig(num_experts=6, hidden_dim=16, router=TopK(k=2), balance=CASES[case])
    sizes = {"vocab_size": 61, "dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "max_seq_len": S}
    model = Decoder(DecoderConfig(**sizes, moe=moe, init_std=0.3)).double()
    recorder = Recorder(model, reduce=dist.all_reduce)
    own = split(whole_batch(), world)[rank]
    loss = gradients(model, split(own, 2), 1, False, recorder, reduce=dist.all_reduce)
    result = {"loss": torch.tensor(loss, dtype=torch.float64)}
    result |= {name: parameter.grad for name, parameter in model.named_parameters()}
    for value in result.values():
        dist.all_reduce(value)  # summed, not averaged
    reduce_and_update(model.moe_layers.values(), dist.all_reduce)
    result |= {name: buffer.double() for name, buffer in model.named_buffers() if "bias_E" in name}
    result["counts"] = torch.stack([torch.from_numpy(stats.counts_E) for stats in recorder.flush(1)]).double()
    return result


def main(folder: Path, world: int, rank: int) -> None:
    with process_group(folder / f"{world}.meet", rank, world):
        results = {case: run(case, world, rank) for case in CASES}
        if rank == 0:
            torch.save(results, folder / f"{world}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
