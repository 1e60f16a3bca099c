"""`equipoise serve` over ranks: the answers of one process, operators' verbs, and what ends when a rank does."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from equipoise.commands.serve import RankOptions, ServeOptions, serve
from equipoise.models.run_files import load
from equipoise.monitor.store import RunStore
from equipoise.serve import reference
from equipoise.serve.request import Request, Sampling

SRC = Path(__file__).parents[3] / "src"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SRC)}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


class Job:
    """The processes of a server. `ranks` by rank; `torchrun` where that started them. Errors go to files."""

    def __init__(self, run, size, folder, *options, torchrun=False):
        self.out, self.size, self.errors = folder / "serving", size, folder / "errors"
        command = ["-m", "equipoise", "serve", str(run), "--port", "0", "--admin-port", "0", "--out", str(self.out)]
        command += ["--parallel.expert", str(size), *options]
        folder.mkdir(exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        common = ENV | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        with self.errors.open("w") as errors:
            if torchrun:
                words = [*TORCHRUN, f"--nproc-per-node={size}", *command]
                self.started = [subprocess.Popen(words, env=ENV, stdout=subprocess.PIPE, stderr=errors, text=True)]
            else:
                self.started = [
                    subprocess.Popen(
                        [sys.executable, *command],
                        env=common | {"RANK": str(rank)},
                        stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                        stderr=errors,
                        text=True,
                    )
                    for rank in range(size)
                ]
        self.lines = []
        try:
            self.url = self._find(r" at (http://127\.0\.0\.1:\d+)/v1")
            self.admin = self._find(r"admin at (http://127\.0\.0\.1:\d+/admin)")
        except BaseException:
            self.kill()
            raise

    def _find(self, pattern):
        for line in self.started[0].stdout:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError(f"{self.lines}\n{self.errors.read_text()}")

    def pid(self, rank):
        if len(self.started) == self.size:
            return self.started[rank].pid
        for task in Path(f"/proc/{self.started[0].pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                    return int(child)
        raise AssertionError(f"no rank {rank}")

    def post(self, verb, body=None):
        token = (self.out / "admin_token").read_text()
        return httpx.post(
            f"{self.admin}/{verb}", json=body or {}, headers={"authorization": f"Bearer {token}"}, timeout=60
        )

    def complete(self, prompt, max_tokens=24, **fields):
        body = {"model": "run", "prompt": prompt, "max_tokens": max_tokens, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]

    def stream(self, max_tokens):
        """The pieces of a long answer, as they come: texts, and errors as dictionaries."""
        body = {"model": "run", "prompt": "The", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))

    def end(self, seconds=60):
        """(exit codes of what was started, all that the first rank printed, all errors)."""
        out = self.started[0].communicate(timeout=seconds)[0]
        codes = [each.wait(timeout=seconds) for each in self.started]
        return codes, "".join(self.lines) + out, self.errors.read_text()

    def kill(self):
        for each in self.started:
            if each.poll() is None:
                each.kill()
                each.wait()


@pytest.fixture(scope="module")
def job(trained, tmp_path_factory):
    """Two ranks, which the last test that uses them ends."""
    made = Job(trained, 2, tmp_path_factory.mktemp("ranks"), "--recover", "--flush-s", "0.2")
    yield made
    made.kill()


def alone(run, prompt, sampling, max_tokens=24):
    """One process, one request, no cache."""
    loaded = load(run)
    tokens = tuple(loaded.tokenizer.encode(prompt).tolist())
    return reference.answer(loaded.model, loaded.tokenizer, Request("x", tokens, max_tokens, sampling)).text


def test_answers_are_those_of_one_process(job, trained):
    assert any(re.search(r"experts on 2 ranks: \d\.\d, \d\.\d MB", line) for line in job.lines)
    for number, prompt in enumerate(("In the beginning", "def read(self):", "It is")):
        assert job.complete(prompt, temperature=0) == alone(trained, prompt, Sampling(temperature=0.0))
        assert job.complete(prompt, seed=number) == alone(trained, prompt, Sampling(seed=number))
    pieces = [piece["choices"][0]["text"] for piece in job.stream(24) if piece["choices"]]
    assert len(pieces) > 5
    assert httpx.get(f"{job.url}/health").json()["status"] == "ok"


def test_verbs_change_the_model_on_all_ranks(job, trained):
    greedy = Sampling(temperature=0.0)
    taken = job.post("reload", {"checkpoint": "step-000040", "max_loss_increase": 10}).json()
    assert (taken["number"], taken["source"]) == (2, "step-000040")
    before = alone(trained / "checkpoints" / "step-000040", "The house", greedy)
    assert job.complete("The house", temperature=0) == before
    assert job.post("reload/undo").json()["source"] == "step-000080"
    assert job.complete("The house", temperature=0) == alone(trained, "The house", greedy) != before
    assert job.post("reload", {"checkpoint": "step-000040", "max_loss_increase": 0}).status_code == 409
    assert job.complete("The house", temperature=0) == alone(trained, "The house", greedy)
    assert len(job.post("router/rollback").json()["actions"]) == 2
    refused = job.post("faults", {"fault": {"fault": "nan-expert", "layer": "layers.1.mlp", "expert": 3}})
    assert refused.status_code == 409
    assert "layers.1.mlp has none in this process; choose another layer, or a process" in refused.text
    slow = {"fault": "slow-expert", "layer": "layers.1.mlp", "expert": 3, "seconds": 0.001}
    assert job.post("faults", {"fault": slow}).status_code == 200
    assert job.post("faults/remove").status_code == 200
    with RunStore.open_readonly(job.out) as store:
        [(_, share, _)] = store.scalar_history("exposed_communication", last=1)
        assert 0 <= share < 1


def test_sigterm_to_the_first_finishes_what_is_open_and_ends_all(job):
    pieces = job.stream(60)
    next(pieces)
    os.kill(job.pid(1), signal.SIGTERM)  # as torchrun does, to all of them
    os.kill(job.pid(0), signal.SIGTERM)
    last = list(pieces)
    assert any(piece["choices"] and piece["choices"][0]["finish_reason"] == "length" for piece in last)
    codes, out, errors = job.end()
    assert codes == [0, 0], errors
    assert "stopped\n" in out
    assert "Traceback" not in errors


def test_what_needs_all_experts_in_one_process_is_refused(run, monkeypatch):
    before = sorted(run.iterdir())
    with pytest.raises(ValueError, match="2 processes are asked for, and this is one alone; start them with torchrun"):
        serve(run, parallel=RankOptions(expert=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"expected 2, as many as torchrun started processes, got 1; add --parallel"):
        serve(run)
    for name, value in {
        "ray": 2,
        "expert_precision": "int8",
        "expert_memory": "1M",
        "device": "cuda",
        "breaker_by": "expert",
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}: is not to be had with --parallel\.expert: .*; "):
            serve(run, options=ServeOptions(**{name: value}), parallel=RankOptions(expert=2))
    with pytest.raises(ValueError, match=r"parallel\.timeout_s: expected seconds, more than 0"):
        serve(run, parallel=RankOptions(expert=2, timeout_s=0))
    assert sorted(run.iterdir()) == before


# ------------------------------------------------------------------------------------------------- when a rank is lost


def lose(job, what, after=lambda: None):
    """(the last piece of an answer that is under way when `what` happens, seconds until the first has ended, the end).

    after: is called then.
    """
    pieces, last = job.stream(100_000), []
    next(pieces)
    reader = threading.Thread(target=lambda: last.extend(pieces))
    reader.start()
    began = time.monotonic()
    what()
    reader.join(60)
    job.started[0].wait(timeout=60)
    seconds = time.monotonic() - began
    after()
    return last[-1], seconds, job.end()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 3])
def test_a_killed_rank_ends_the_server_and_has_a_name(long, tmp_path, victim):
    job = Job(long, 4, tmp_path, torchrun=True)
    try:
        pid = job.pid(victim)
        last, seconds, (codes, _, errors) = lose(job, lambda: os.kill(pid, signal.SIGKILL))
    finally:
        job.kill()
    assert last["error"]["type"] == "server_error"
    assert f"equipoise: the server has ended: rank {victim} (process {pid} on" in errors
    assert codes[0] != 0
    assert seconds < 45
    for rank in {0, 1, 2, 3} - {victim}:
        assert f"rank {rank} (process" not in errors


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_server_after_the_timeout(long, tmp_path):
    job = Job(long, 2, tmp_path, "--parallel.timeout-s", "5")
    pid = job.pid(1)
    try:
        last, seconds, (_, _, errors) = lose(
            job, lambda: os.kill(pid, signal.SIGSTOP), lambda: os.kill(pid, signal.SIGKILL)
        )
    finally:
        job.kill()
    assert last["error"]["type"] == "server_error"
    assert f"equipoise: the server has ended: rank 1 (process {pid} on" in errors
    assert 4 < seconds < 20


@pytest.mark.slow
def test_a_rank_that_dies_while_nothing_is_computed_is_noticed(trained, tmp_path):
    job = Job(trained, 2, tmp_path)
    try:
        os.kill(job.pid(1), signal.SIGKILL)
        began = time.monotonic()
        codes, _, errors = job.end()
    finally:
        job.kill()
    assert codes == [2, -signal.SIGKILL]
    assert "equipoise: the server has ended: rank 1 (process" in errors
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_the_others_end_when_the_first_does(trained, tmp_path):
    job = Job(trained, 3, tmp_path)
    try:
        os.kill(job.pid(0), signal.SIGKILL)
        codes, _, errors = job.end()
    finally:
        job.kill()
    assert codes == [-signal.SIGKILL, 2, 2]
    assert "equipoise: rank 2: the rank that serves has gone" in errors


@pytest.fixture
def long(run):
    """A run whose answers may be so long that something can happen meanwhile."""
    config = json.loads((run / "config.json").read_text())
    config["model"]["max_seq_len"] = 200_000
    (run / "config.json").write_text(json.dumps(config))
    return run
