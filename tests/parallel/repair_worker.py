"""One rank of tests/parallel/test_repairs.py: FOLDER WORLD RANK. Goes on with FOLDER/run-WORLD; the last rank dies."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tests.parallel.repairs import lose_the_last, story

from equipoise.parallel import ParallelConfig, make_ranks


def main(folder: Path, world: int, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world}.meet", rank=rank, world_size=world)
    data = 2 if world == 4 else 1
    ranks = make_ranks(ParallelConfig(data=data, expert=world // data))
    told, trainer = story(folder / f"run-{world}", ranks)
    (folder / f"{world}.{rank}.json").write_text(json.dumps(told))
    lost = lose_the_last(trainer)
    (folder / f"{world}.{rank}.lost").write_text(lost)
    os._exit(0)  # the group is broken: there is nobody to say goodbye to


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
