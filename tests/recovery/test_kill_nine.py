"""kill -9 at any moment of a run that saves, keeps what is good, prunes, repairs and reloads: what is on disk is whole.

The test of the deaths at chosen files is in test_failure_stories.py; here the moments are drawn at random.
"""

import json
import os
import random
import signal
import threading
from pathlib import Path

import pytest
from tests.recovery.crash_jobs import Zygote

from equipoise.disk.checkpoint import list_checkpoints, load_checkpoint
from equipoise.recovery.known_good import KnownGood

PATIENCE = 20.0  # seconds after which a test fails; none of them waits for it when all is well


def check(folder: Path) -> int:
    """That all on disk is whole; the newest step, 0 before the first record."""
    checkpoints = {path.name for path in list_checkpoints(folder / "checkpoints")}
    for name in checkpoints:
        assert load_checkpoint(folder / "checkpoints" / name).state == {"step": int(name.split("-")[1])}
    # Half a folder may only be there under a name that nobody takes for a checkpoint.
    assert {path.name for path in (folder / "checkpoints").glob("step-*")} == checkpoints
    for path in folder.rglob("*.json"):
        if not any(part.startswith(".tmp-") for part in path.parts):
            json.loads(path.read_text())
    registry = KnownGood(folder, keep=2)
    for record in registry.records:
        assert registry.load(record)["router.weight"].shape == (4, 8)
        assert record.checkpoint in checkpoints  # what can be gone back to is never pruned
    if (folder / "known_good.json").exists():
        named = json.loads((folder / "known_good.json").read_text())["records"]
        assert len(named) == len(registry.records)  # no name without its file
    return registry.latest().step if registry.records else 0


def kill_again_and_again(folder, num_kills, seed):
    """How many kills left something half done. After them one more process has to get further than all before."""
    rng, newest, half = random.Random(seed), 0, 0
    pause = threading.Event()
    with Zygote() as zygote:
        for _ in range(num_kills):
            pid = zygote.start("run_for_ever", str(folder))
            pause.wait(rng.uniform(0.005, 0.150))  # the moment is what is drawn; nothing is awaited
            kill(zygote, pid)
            before, newest = newest, check(folder)
            assert newest >= before  # nothing that was kept is lost
            half += any(path.name.startswith((".tmp-", ".")) for path in folder.rglob(".*"))
        pid, registry = zygote.start("run_for_ever", str(folder)), KnownGood(folder)
        for _ in range(int(PATIENCE / 0.01)):
            if registry.records and registry.latest().step > newest + 1:
                break
            pause.wait(0.01)
        kill(zygote, pid)
        assert check(folder) > newest + 1
    return half


def kill(zygote, pid):
    os.kill(pid, signal.SIGKILL)
    assert zygote.wait(pid) == -signal.SIGKILL  # it was running, so it had found no fault with what was there


def test_eight_kills(tmp_path):
    kill_again_and_again(tmp_path / "run", 8, seed=0)


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    half = kill_again_and_again(tmp_path / "run", 100, seed=1)
    assert half >= 5  # it did hit moments in which something was half done
