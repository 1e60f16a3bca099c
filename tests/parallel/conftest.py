"""Ranks as real processes that talk over loopback."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
