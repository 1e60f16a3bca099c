"""A process that imports torch once and forks children on request, for tests that kill them or run several at once.

Run as a script it reads jobs from stdin, one JSON list a line: ["start", job, arguments] or ["wait", pid].
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path


class Zygote:
    """The test's end. Use as a context manager."""

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *error):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(self, job, *arguments):
        """The pid of a child that has just begun this job."""
        return int(self._ask("start", job, arguments))

    def wait(self, pid):
        """How the child ended: 0 when all went well, minus the signal that killed it."""
        return os.waitstatus_to_exitcode(int(self._ask("wait", pid)))

    def _ask(self, *request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


def put_many(folder, name, first_step, count):
    """Put records of this writer's own tensors, every other one the same as before."""
    import torch

    from equipoise.recovery.known_good import KnownGood

    registry = KnownGood(folder, keep=1000)
    for step in range(first_step, first_step + count):
        tensors = {name: torch.full((4,), float(step // 2))}
        registry.put(step=step, tensors=tensors, baselines=some_baselines(), loss=1.0)


CALLS = {"open", "write", "flush", "close", "fsync", "replace", "rename", "unlink", "mkdir", "flock"}


def put_and_die(folder, step, at):
    """Put one record, and die without a chance to clean up just before the at-th call that has to do with files."""
    import signal

    import torch

    from equipoise.recovery.known_good import KnownGood

    calls = [0]

    def watch(frame, event, function):
        if event == "c_call" and function.__name__ in CALLS:
            calls[0] += 1
            if calls[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)

    registry = KnownGood(folder, keep=2)
    tensors = {"router.weight": torch.full((4,), float(step))}
    baselines = some_baselines()
    sys.setprofile(watch)
    registry.put(step=step, tensors=tensors, baselines=baselines, loss=1.0 - step / 1000)


def run_for_ever(folder):
    """A small run: it trains (by noise), saves, keeps what is good, prunes, repairs and takes back, reloads.

    It goes on from what an earlier process left. Any error ends it with exit code 1.
    """
    import torch

    from equipoise.disk.checkpoint import clean_leftovers, prune_checkpoints, save_checkpoint
    from equipoise.layer import MoE
    from equipoise.recovery.known_good import KnownGood
    from equipoise.recovery.router_state import router_state
    from equipoise.recovery.swap import digest, swap
    from equipoise.recovery.weights import reload_weights

    registry, root = KnownGood(folder, keep=2), Path(folder) / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    clean_leftovers(root)
    model = MoE(8, 8, 4)
    reload = reload_weights(model, root)
    step = 0
    if registry.records:
        step = registry.latest().step
        reload(registry.latest().checkpoint)
    parent = os.getppid()
    while os.getppid() == parent:  # nobody is left behind when a test is interrupted
        step += 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape))
        before = digest(model.state_dict())
        name = save_checkpoint(root, step, {"model": model.state_dict()}, {"step": step}).name
        registry.put(
            step=step,
            tensors=router_state(model),
            baselines=some_baselines(),
            loss=1 + step % 7 / 1000,
            checkpoint=name,
        )
        prune_checkpoints(root, 1, [root / each for each in registry.checkpoints()])
        done = swap(model, registry.load(registry.records[0]))
        back = reload(registry.records[0].checkpoint)
        back()
        done.undo()
        if digest(model.state_dict()) != before:
            raise RuntimeError("the way back led elsewhere")


def some_baselines():
    """Of one layer with 4 experts."""
    from equipoise.monitor.baseline import Baseline

    return {"a": Baseline("a", 10, (5, 5, 5, 5), 1.0, 0.0, 1.0, 1.5)}


def _serve():
    import torch  # and all that jobs need, once

    import equipoise.recovery.weights  # noqa: F401

    torch.set_num_threads(1)
    jobs = {"put_many": put_many, "put_and_die": put_and_die, "run_for_ever": run_for_ever}
    for line in sys.stdin:
        kind, *request = json.loads(line)
        if kind == "wait":
            os.write(1, f"{os.waitpid(request[0], 0)[1]}\n".encode())
        elif os.fork() == 0:
            try:
                os.write(1, f"{os.getpid()}\n".encode())
                jobs[request[0]](*request[1])
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)


if __name__ == "__main__":
    _serve()
