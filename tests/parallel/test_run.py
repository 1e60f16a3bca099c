"""`equipoise train` under torchrun, as a user starts it: the same run as alone; a rank killed; a rank that hangs."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from equipoise.disk.checkpoint import list_checkpoints, load_checkpoint
from equipoise.monitor.store import RunStore

# A balancing loss of micro scope sees what one rank sees: the micro-batches are those of the ranks.
SMALL = (
    "tiny",
    "--batch-size",
    "8",
    "--micro-batch-size",
    "4",
    "--eval-every",
    "0",
    "--bf16",
    "False",
    "--device",
    "cpu",
)
ENV = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def command(ranks: int, *arguments: str, restarts: int = 0) -> list[str]:
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}",
    ]
    return [sys.executable, *torchrun, "-m", "equipoise", "train", *arguments, f"--parallel.expert={ranks}"]


def run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, env=ENV, capture_output=True, text=True, timeout=300, check=False)


def last_weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(list_checkpoints(out / "checkpoints")[-1]).tensors["model"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    done = run([sys.executable, "-m", "equipoise", "train", *SMALL, "--steps", "20", "--out", str(out)])
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_over_ranks_is_the_run_of_one_process(alone, tmp_path):
    """The loss of 20 steps, and what was counted, to the last token. One process tells about it."""
    out = tmp_path / "run"
    done = run(command(2, *SMALL, "--steps", "20", "--out", str(out), "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["step"] == 20
    with RunStore.open_readonly(alone) as one, RunStore.open_readonly(out) as many:
        for (step, loss, _), (_, wanted, _) in zip(
            many.scalar_history("loss"), one.scalar_history("loss"), strict=True
        ):
            assert loss == pytest.approx(wanted, rel=1e-4), step
        assert one.flush_steps() == many.flush_steps() != []
        first = many.latest_routing(at=10)
        for stats, wanted in zip(first, one.latest_routing(at=10), strict=True):
            assert stats.num_tokens == wanted.num_tokens
            assert stats.counts_E.sum() == wanted.counts_E.sum()
        [(step, share, _)] = many.scalar_history("exposed_communication", last=1)
        assert step == 20
        assert 0 < share < 1


@pytest.mark.slow
def test_a_lost_rank_is_started_again_and_nothing_is_lost(alone, tmp_path):
    """Each rank in turn is killed at a random moment; the run ends with the same bits as one that nobody touched."""
    arguments = (*SMALL, "--steps", "20", "--checkpoint-every", "2")
    calm = tmp_path / "calm"
    assert run(command(2, *arguments, "--out", str(calm))).returncode == 0
    for victim in range(2):
        out = tmp_path / f"killed-{victim}"
        argv = command(2, *arguments, "--out", str(out), restarts=3)
        job = subprocess.Popen(argv, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            wait_for_checkpoint(out, job, random.Random(victim).choice((2, 4, 8)))
            os.kill(rank_pid(job.pid, victim), signal.SIGKILL)
            errors = job.communicate(timeout=300)[1]
        finally:
            job.kill()
        assert job.returncode == 0, errors
        assert "resumed from" in errors or list_checkpoints(out / "checkpoints")
        for name, value in last_weights(calm).items():
            assert torch.equal(value, last_weights(out)[name]), name
        with RunStore.open_readonly(out) as store, RunStore.open_readonly(calm) as wanted:
            losses, expected = store.scalar_history("loss"), wanted.scalar_history("loss")
            assert [(step, loss) for step, loss, _ in losses] == [(step, loss) for step, loss, _ in expected]


@pytest.mark.slow
def test_a_rank_that_hangs_is_an_error_with_rank_layer_and_step(tmp_path):
    out = tmp_path / "run"
    arguments = (*SMALL, "--steps", "2000", "--checkpoint-every", "2", "--parallel.timeout-s", "5")
    argv = command(2, *arguments, "--out", str(out))
    job = subprocess.Popen(argv, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    stopped = None
    try:
        wait_for_checkpoint(out, job, 2)
        stopped = rank_pid(job.pid, 1)
        os.kill(stopped, signal.SIGSTOP)
        errors = job.communicate(timeout=120)[1]
    finally:
        job.kill()
        if stopped is not None and Path(f"/proc/{stopped}").exists():
            os.kill(stopped, signal.SIGKILL)
    assert job.returncode != 0
    assert re.search(r"step \d+: rank 0, .*: an exchange with the other ranks did not end", errors), errors


def test_ranks_without_torchrun_are_told_how(tmp_path):
    argv = [sys.executable, "-m", "equipoise", "train", *SMALL, "--parallel.expert", "2", "--out", str(tmp_path / "x")]
    done = run(argv)
    assert done.returncode == 2
    assert "start them with torchrun --nproc-per-node 2 -m equipoise" in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_cuda_without_a_gpu_for_each_rank_is_told(tmp_path):
    done = run(command(1, *SMALL[:-1], "cuda", "--out", str(tmp_path / "x")))
    assert done.returncode != 0
    assert "expected a GPU for each of the 1 ranks on this machine, got 0; start fewer, or take" in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a CUDA GPU can tell")
def test_a_rank_with_a_gpu_trains_on_it_through_nccl(tmp_path):
    losses = []
    for name, start in (("alone", [sys.executable, "-m", "equipoise", "train"]), ("rank", command(1)[:-1])):
        done = run([*start, *SMALL[:-1], "cuda", "--steps", "6", "--out", str(tmp_path / name)])
        assert done.returncode == 0, done.stderr
        with RunStore.open_readonly(tmp_path / name) as store:
            losses.append([loss for _, loss, _ in store.scalar_history("loss")])
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_shortcut_trains_over_ranks_and_is_not_sharded(tmp_path):
    """The same first steps as alone, where rows travel behind attention; FSDP2 would never gather its weights."""
    small = ("tiny_scmoe", *SMALL[1:], "--steps", "3")
    whole, spread = tmp_path / "whole", tmp_path / "spread"
    done = run([sys.executable, "-m", "equipoise", "train", *small, "--out", str(whole)])
    assert done.returncode == 0, done.stderr
    done = run(command(2, *small, "--out", str(spread)))
    assert done.returncode == 0, done.stderr
    with RunStore.open_readonly(whole) as one, RunStore.open_readonly(spread) as many:
        losses = [loss for _, loss, _ in many.scalar_history("loss")]
        assert losses == pytest.approx([loss for _, loss, _ in one.scalar_history("loss")], rel=1e-5)
        assert len(losses) == 3
    done = run(command(2, *small, "--parallel.shard", "--out", str(tmp_path / "sharded")))
    assert done.returncode != 0
    assert "parallel.shard: expected False for a model with a shortcut" in done.stderr


def wait_for_checkpoint(out: Path, job: subprocess.Popen[str], step: int) -> None:
    """Until the run has that one, or has ended."""
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / f"step-{step:06d}" / "manifest.json").exists():
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rank_pid(torchrun: int, rank: int) -> int:
    """The process of a rank, found by its environment among torchrun's children."""
    for task in Path(f"/proc/{torchrun}/task").iterdir():
        for child in (task / "children").read_text().split():
            if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                return int(child)
    raise AssertionError(f"no rank {rank}")
