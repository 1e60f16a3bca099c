"""The processes of a server that torchrun has started. Which of them does what is decided elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist


@dataclass(frozen=True, eq=False)
class World:
    """size: processes. rank: of this one, from 0. group: of all of them, over gloo."""

    rank: int
    size: int
    group: dist.ProcessGroup


def check_size(expert: int, environment: Mapping[str, str]) -> None:
    """Raise ValueError unless `expert` processes were started. environment: that of this process."""
    there = int(environment.get("WORLD_SIZE", "1"))
    if expert < 1:
        raise ValueError(f"parallel.expert: expected at least 1, got {expert}")
    if there == expert:
        return
    if there == 1:
        raise ValueError(
            f"parallel.expert: {expert} processes are asked for, and this is one alone; start them with "
            f"torchrun --nproc-per-node {expert} -m equipoise serve ... --parallel.expert {expert}"
        )
    raise ValueError(
        f"parallel.expert: expected {there}, as many as torchrun started processes, got {expert}; add "
        f"--parallel.expert {there}, or change --nproc-per-node"
    )


@contextmanager
def joined(timeout_s: float) -> Iterator[World]:
    """This process among those of torchrun, until the end. timeout_s: until an exchange that does not end is an error.

    Raises ValueError for no time at all.
    """
    if not 0 < timeout_s <= 1e6:
        raise ValueError(f"parallel.timeout_s: expected seconds, more than 0 and at most 1e6, got {timeout_s}")
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    try:
        group = dist.group.WORLD
        assert group is not None
        yield World(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group()
