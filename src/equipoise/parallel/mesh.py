"""Which ranks do what together: groups of processes by their part in data and expert parallelism.

The engine is PyTorch's own: torchrun starts the processes, `init_device_mesh` makes the groups. Every rank computes the
dense part of its own share of each batch; the experts of a layer are spread over the ranks of an expert group, and held
once per data group member.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from equipoise.parallel.exchange import sum_over
from equipoise.parallel.payload import PayloadName, payloads

TIMEOUT_S = 600.0
DispatcherName = Literal["all_to_all", "all_gather"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a job is spread over processes; the product of data and expert is their number.

    Under torchrun, e.g. `torchrun --nproc-per-node 4 -m equipoise train demo --parallel.expert 2 --parallel.data 2`.
    """

    expert: int = 1
    """Ranks that share the experts of each layer."""
    data: int = 1
    """Copies of that."""
    nodes: int = 1
    """Nodes that an expert group spans; more than 1 sends tokens between nodes once, and spreads them within."""
    shard: bool = False
    """Shard weights, gradients and optimizer state over data-parallel ranks (FSDP2), all but the experts'; such a run
    does not repair itself."""
    dispatcher: DispatcherName = "all_to_all"
    """all_to_all, or all_gather where `equipoise bench links` finds that faster."""
    chunks: int = 1
    """Of the tokens of a layer; with more than 1, some are under way while others are computed."""
    payload: PayloadName = "as_is"
    """What travels to the experts: as_is, bf16, int8 or fp8."""
    placement: Path | None = None
    """Which rank of an expert group holds what, as `equipoise place` plans it; default: consecutive experts."""
    timeout_s: float = TIMEOUT_S
    """Seconds until an exchange that does not end is an error."""

    def __post_init__(self) -> None:
        for name in ("expert", "data", "nodes", "chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name}: expected at least 1, got {getattr(self, name)}")
        if self.expert % self.nodes:
            raise ValueError(f"parallel.nodes: expected a divisor of parallel.expert = {self.expert}, got {self.nodes}")
        if self.dispatcher not in get_args(DispatcherName):
            raise ValueError(f"parallel.dispatcher: expected all_to_all or all_gather, got {self.dispatcher!r}")
        if self.dispatcher == "all_gather" and self.nodes > 1:
            raise ValueError("parallel.dispatcher: all_gather knows no nodes; set parallel.nodes=1, or use all_to_all")
        if self.chunks > 1 and (self.nodes > 1 or self.dispatcher == "all_gather"):
            raise ValueError(
                f"parallel.chunks: expected 1 with nodes or all_gather, got {self.chunks}; only all_to_all in one hop "
                "is cut into chunks"
            )
        payloads(self.payload)
        if not self.timeout_s > 0:
            raise ValueError(f"parallel.timeout_s: expected more than 0, got {self.timeout_s}")

    @property
    def size(self) -> int:
        """Processes."""
        return self.expert * self.data


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes of a job, and where this one is among them.

    mesh: (data, node, local), the last two making an expert group. world: all of them. expert: those that share this
    rank's experts with it; across: those in the same place on the other nodes of it; within: those on its node.
    data: those that hold the same experts as this rank.
    """

    config: ParallelConfig
    mesh: DeviceMesh
    world: dist.ProcessGroup
    expert: dist.ProcessGroup
    across: dist.ProcessGroup
    within: dist.ProcessGroup
    data: dist.ProcessGroup

    @property
    def rank(self) -> int:
        """Of all processes."""
        return dist.get_rank(self.world)

    @property
    def size(self) -> int:
        """All processes."""
        return dist.get_world_size(self.world)

    @property
    def expert_rank(self) -> int:
        """This rank's number in its expert group, by which placements name it."""
        return dist.get_rank(self.expert)

    @property
    def data_rank(self) -> int:
        """This rank's number among those with the same experts."""
        return dist.get_rank(self.data)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and reports."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> None:
        """Sum over all ranks, in place. Raises CollectiveError when one of them does not come."""
        sum_over(tensor, self.world, "a sum over all ranks")

    def barrier(self) -> None:
        """Wait until all are here."""
        dist.barrier(group=self.world)


def make_ranks(config: ParallelConfig, device: str = "cpu") -> Ranks:
    """The groups of a job whose process group is there already.

    Raises ValueError when the number of processes is not data x expert.
    """
    size = dist.get_world_size()
    if size != config.size:
        raise ValueError(
            f"parallel: data = {config.data} times expert = {config.expert} is {config.size} processes, torchrun "
            f"started {size}; change --nproc-per-node, or the two"
        )
    shape = (config.data, config.nodes, config.expert // config.nodes)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("data", "node", "local"))
    flat = mesh["node", "local"]._flatten("expert")
    assert dist.group.WORLD is not None
    return Ranks(
        config,
        mesh,
        dist.group.WORLD,
        flat.get_group(),
        mesh.get_group("node"),
        mesh.get_group("local"),
        mesh.get_group("data"),
    )


@contextmanager
def started(config: ParallelConfig, device: str = "auto") -> Iterator[Ranks | None]:
    """The process group under torchrun, ended at the end; None for a job of one process that torchrun did not start.

    device: see `process_group`. Raises ValueError when ranks are asked for and torchrun started none.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        if config.size > 1:
            raise ValueError(
                f"parallel: {config.size} processes are asked for, and this is one alone; start them with "
                f"torchrun --nproc-per-node {config.size} -m equipoise ..."
            )
        yield None
        return
    with process_group(config.timeout_s, device) as picked:
        yield make_ranks(config, picked)


@contextmanager
def process_group(timeout_s: float = TIMEOUT_S, device: str = "auto") -> Iterator[str]:
    """Of all processes that torchrun has started, ended at the end; "cuda" with NCCL, or "cpu" with gloo.

    device: which; "auto" is cuda where each rank has a GPU. Raises ValueError for cuda where one has none.
    """
    num_ranks, num_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if device == "cuda" and num_gpus < num_ranks:
        raise ValueError(
            f"device: expected a GPU for each of the {num_ranks} ranks on this machine, got {num_gpus}; start fewer, "
            "or take --device cpu"
        )
    on_gpu = device != "cpu" and num_gpus >= num_ranks
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s))
    try:
        yield "cuda" if on_gpu else "cpu"
        dist.barrier()  # no rank takes its threads down while another still talks to them
    finally:
        dist.destroy_process_group()
