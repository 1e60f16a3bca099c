"""One rank of the long run in tests/parallel/test_training.py: FOLDER WORLD RANK STEPS. Rank 0 writes the losses."""

import json
import sys
from pathlib import Path

import torch
from tests.parallel.cases import CASES, CLIP, backward, build, whole_batch
from tests.ranks import process_group

from equipoise.layer import reduce_and_update
from equipoise.parallel import ParallelConfig, apply_expert_parallel, clip_gradients, make_ranks, sum_gradients
from equipoise.train.step import split

CASE = CASES["balanced, all_to_all"]


def main(folder: Path, world: int, rank: int, steps: int) -> None:
    with process_group(folder / f"{world}.meet", rank, world):
        data = 2 if world == 8 else 1
        ranks = make_ranks(ParallelConfig(data=data, expert=world // data, dispatcher="all_to_all"))
        parallel = apply_expert_parallel(build(CASE), ranks)
        optimizer = torch.optim.AdamW(parallel.model.parameters(), lr=1e-3)
        losses = []
        for step in range(1, steps + 1):
            mine = split(whole_batch(step, CASE.ignored), world)[rank]
            loss = torch.tensor(backward(parallel.model, [mine], [rank], step, ranks.sum), dtype=torch.float64)
            ranks.sum(loss)
            losses.append(float(loss))
            sum_gradients(parallel)
            clip_gradients(parallel, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            reduce_and_update(parallel.layers.values(), ranks.sum, step=step)
        if ranks.is_main:
            (folder / f"{world}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
