"""One rank of tests/parallel/test_repairs.py: FOLDER WORLD RANK [die]. Breaks FOLDER/run-WORLD."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tests.parallel.repairs import going_on, story

from equipoise.parallel import ParallelConfig, make_ranks


class Dies:
    """A policy that ends its process when it is asked."""

    interim = frozenset()

    def __call__(self, situation):
        os._exit(3)


def main(folder: Path, world: int, rank: int, die: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world}.meet", rank=rank, world_size=world)
    data = 2 if world == 4 else 1
    ranks = make_ranks(ParallelConfig(data=data, expert=world // data))
    if die:
        trainer = going_on(folder / f"run-{world}", ranks)
        if rank == world - 1:
            trainer.repairs.recovery.policy = Dies()
        trainer.run()
    told = story(folder / f"run-{world}", ranks)
    (folder / f"{world}.{rank}.json").write_text(json.dumps(told))
    dist.barrier()  # no rank takes its threads down while another still talks to them
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] == ["die"])
