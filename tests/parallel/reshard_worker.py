"""One rank of tests/parallel/test_checkpoint.py: FOLDER WORLD RANK SHARD FROM TO.

Trains a step where FROM is "nothing", else goes on from there; writes TO; says what memory its experts take.
"""

import json
import sys
from pathlib import Path

from tests.parallel.cases import CASES, Case, backward, build, parts_of
from tests.ranks import process_group

from equipoise.disk.checkpoint import latest_checkpoint
from equipoise.monitor.watch import Watch
from equipoise.parallel import ParallelConfig, make_ranks
from equipoise.routing import BiasBalance, SwitchLoss, TopK
from equipoise.train.config import OptimConfig
from equipoise.train.optim import build_optimizer
from equipoise.train.snapshot import pack_optimizer
from equipoise.train.spread import OverRanks

MODEL = Case({"router": TopK(k=2), "balance": (SwitchLoss(0.1), BiasBalance())}, CASES["balanced, all_to_all"].parallel)


def main(folder: Path, world: int, rank: int, shard: bool, source: str, target: str) -> None:
    with process_group(folder / f"{target}.meet", rank, world):
        data = 2 if world == 4 else 1
        ranks = make_ranks(ParallelConfig(data=data, expert=world // data, shard=shard, dispatcher="all_to_all"))
        spread = OverRanks(build(MODEL).float(), ranks)
        model = spread.parallel.model
        optimizer = build_optimizer(model, OptimConfig())
        watch = Watch(model, every=1, reduce=ranks.sum)
        step = 1
        if source == "nothing":
            parts = parts_of(MODEL, 1)
            per_rank = len(parts) // world
            mine = range(rank * per_rank, (rank + 1) * per_rank)
            backward(model, parts[mine.start : mine.stop], mine, 1, ranks.sum)
            spread.clip(1.0)
            optimizer.step()
        else:
            step, _ = spread.restore(latest_checkpoint(folder / source), model, optimizer, watch.recorder)
        tensors, described = pack_optimizer(optimizer)
        groups = {"model": dict(model.state_dict()), "optimizer": tensors, "recorder": watch.recorder.state_dict()}
        spread.save(folder / target, step, (groups, {"optimizer": described, "rng": {}}), optimizer)
        held = sum(parameter.nbytes for _, parameter in spread.parallel.expert_parameters.values())
        (folder / f"{target}.{rank}.json").write_text(json.dumps({"expert_bytes": held}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "shard", sys.argv[5], sys.argv[6])
