"""Expert parallelism on torch.distributed, applied to a model from outside."""

from equipoise.parallel.apply import ExpertParallel, apply_expert_parallel
from equipoise.parallel.exchange import CollectiveError
from equipoise.parallel.gradients import clip_gradients, sum_gradients
from equipoise.parallel.mesh import ParallelConfig, Ranks, make_ranks, started

__all__ = [
    "CollectiveError",
    "ExpertParallel",
    "ParallelConfig",
    "Ranks",
    "apply_expert_parallel",
    "clip_gradients",
    "make_ranks",
    "started",
    "sum_gradients",
]
