"""One rank of tests/parallel/test_training.py: FOLDER WORLD RANK every|some. Trains its share of each case."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.parallel.cases import CASES, CLIP, PARTS, STEPS, Case, backward, build, names_for, parts_of
from tests.ranks import process_group
from torch.distributed.tensor import DTensor

from equipoise.layer import reduce_and_update
from equipoise.parallel import (
    ExpertParallel,
    ParallelConfig,
    apply_expert_parallel,
    clip_gradients,
    make_ranks,
    sum_gradients,
)
from equipoise.parallel.move import move_experts
from equipoise.parallel.shard import shard_dense


def spread(case: Case, world: int) -> ExpertParallel:
    data = case.data.get(world, 1)
    sizes = {"data": data, "expert": world // data}
    ranks = make_ranks(ParallelConfig(**sizes, **case.parallel))
    model = build(case)
    placements = None
    if case.placement is not None:
        placements = {name: case.placement(world // data) for name in model.moe_layers}
    parallel = apply_expert_parallel(model, ranks, placements)
    if ranks.config.shard:
        shard_dense(parallel, list(model.layers))
    return parallel


def moved(parallel: ExpertParallel, case: Case, optimizer: torch.optim.Optimizer) -> tuple[ExpertParallel, bool]:
    """(with the other placement, whether outputs have the same bits as before)."""
    tokens_BS = parts_of(case, 1)[0].tokens_BS

    def outputs() -> torch.Tensor:
        with torch.no_grad():
            return parallel.model.eval()(tokens_BS)

    before, placement = outputs(), case.move_to(parallel.ranks.config.expert)
    parallel = move_experts(parallel, dict.fromkeys(parallel.layers, placement), optimizer)
    same = torch.equal(before, outputs())
    parallel.model.train()
    return parallel, same


Named = dict[str, torch.Tensor]


def train(parallel: ExpertParallel, case: Case) -> tuple[Named, Named]:
    """(the same steps as `train_alone`, of this rank's parts, with this rank's experts; what else is to be noted)."""
    model, ranks = parallel.model, parallel.ranks
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    per_rank = PARTS // ranks.size
    numbers = range(ranks.rank * per_rank, (ranks.rank + 1) * per_rank)
    record, note = {}, {}
    for step in range(1, STEPS + 1):
        parts = parts_of(case, step)[numbers.start : numbers.stop]
        loss = torch.tensor(backward(model, parts, numbers, step, ranks.sum)).double()
        ranks.sum(loss)
        sum_gradients(parallel)
        record[f"loss.{step}"] = loss
        record[f"norm.{step}"] = torch.tensor(clip_gradients(parallel, CLIP)).double()
        record |= {f"grad.{step}.{name}": whole(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        reduce_and_update(model.moe_layers.values(), ranks.sum, step=step)
        if step == 1 and case.move_to is not None:
            parallel, same = moved(parallel, case, optimizer)
            note["same_bits"] = torch.tensor(same)
    for layer in parallel.layers:
        note[f"slots.{layer}"] = torch.tensor(parallel.slots(layer), dtype=torch.int64)
    return record | {f"state.{name}": whole(value).double() for name, value in model.state_dict().items()}, note


def whole(value: torch.Tensor) -> torch.Tensor:
    """Of a tensor that FSDP2 has sharded, all of it."""
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def main(folder: Path, world: int, rank: int, every: bool) -> None:
    with process_group(folder / f"{world}.meet", rank, world):
        for name in names_for(world, every):
            case = CASES[name]
            record, note = train(spread(case, world), case)
            save_file(record, folder / f"{name}.{world}.{rank}.safetensors")
            save_file(note, folder / f"{name}.{world}.{rank}.note.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "every")
