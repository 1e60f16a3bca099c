"""Ranks as real processes that talk over loopback: how a test starts them, and what each does first and last."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]


@contextmanager
def process_group(meet: Path, rank: int, world: int) -> Iterator[None]:
    """Gloo, on one thread; ranks find each other by the file. Taken down also by a rank that fails.

    A process that ends with its group's threads still up may abort: "terminate called without an active exception".
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    try:
        yield
        dist.barrier()  # no rank takes its threads down while another still talks to them
    finally:
        dist.destroy_process_group()


def run_ranks(script: Path, folder: Path, world: int, *arguments: str, timeout: float = 300) -> list[str]:
    """Run `script FOLDER WORLD RANK ...` for each rank to its end; what each wrote to stderr. Fails with that."""
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(world), str(rank), *arguments],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [rank.communicate(timeout=timeout)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), "\n".join(errors)
    return errors
