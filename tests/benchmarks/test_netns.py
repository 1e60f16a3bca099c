"""Ranks in namespaces of their own: the rate of their links holds, their bytes are counted, and nothing is left over.

Needs root and iproute2; skipped with the reason elsewhere. Two to three ranks, megabytes, seconds.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from benchmarks.netns import cluster, remove_leftovers, run_ranks, unusable

ROOT = Path(__file__).parents[2]
needs_namespaces = pytest.mark.skipif(unusable() is not None, reason=str(unusable()))

EXCHANGE = """
    import json, sys, time
    import torch
    import torch.distributed as dist

    per_rank, repeats = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo")
    sent = torch.full((dist.get_world_size() * per_rank,), dist.get_rank(), dtype=torch.uint8)
    got = torch.empty_like(sent)
    dist.barrier()
    began = time.perf_counter()
    for _ in range(repeats):
        dist.all_to_all_single(got, sent)
    seconds = time.perf_counter() - began
    values = got.view(dist.get_world_size(), per_rank)[:, 0].tolist()
    dist.barrier()
    print(json.dumps({"seconds": seconds, "values": values}))
    dist.destroy_process_group()
"""


def namespaces():
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in listed if name.startswith(f"equipoise-{os.getpid()}-")]


@pytest.fixture
def exchange(tmp_path):
    path = tmp_path / "exchange.py"
    path.write_text(textwrap.dedent(EXCHANGE))
    return path


@needs_namespaces
def test_an_all_to_all_takes_what_the_rate_allows_and_is_counted(exchange):
    ranks, per_rank, repeats, rate = 3, 400_000, 2, 100.0
    with cluster(ranks, rate) as where:
        results = run_ranks(where, [sys.executable, str(exchange), str(per_rank), str(repeats)], timeout_s=120)
    assert [result.code for result in results] == [0] * ranks, results[0].stderr
    to_others = (ranks - 1) * per_rank * repeats  # bytes that each rank sends, and receives
    for result in results:
        said = json.loads(result.stdout)
        assert said["values"] == [0, 1, 2]
        # a law of the token bucket, not a hope: 128 ms at 100 Mbit/s, less what may pass at once
        assert said["seconds"] >= (to_others - 2 * where.burst_bytes) * where.seconds_per_byte
        for passed in (result.wire.sent, result.wire.received):
            # above: 66 bytes of headers on 1448 are 5 %, and acknowledgements; the group's own start is some kilobytes
            assert to_others <= passed <= 1.10 * to_others + 100_000


@needs_namespaces
def test_nothing_is_left_after_the_end_or_an_error():
    with cluster(2):
        assert len(namespaces()) == 3  # two ranks and the bridge
    assert namespaces() == []
    with pytest.raises(ZeroDivisionError), cluster(2, 10.0):
        1 / 0  # noqa: B018
    assert namespaces() == []


@needs_namespaces
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_process_that_was_stopped(number):
    code = "from benchmarks.netns import cluster\nwith cluster(2):\n print('up', flush=True)\n input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with child:
        assert child.stdout.readline() == b"up\n"
        child.send_signal(number)
        child.wait()
    for expected in (0 if number == signal.SIGINT else 3, 0):  # nobody cleans up after kill -9, but the next one does
        left = [name for name in remove_leftovers() if name.startswith(f"equipoise-{child.pid}-")]
        assert len(left) == expected


@needs_namespaces
def test_when_one_rank_fails_the_others_are_killed():
    code = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('no')\ntime.sleep(600)"
    began = time.monotonic()
    with cluster(2) as where:
        first, second = run_ranks(where, [sys.executable, "-c", code], timeout_s=300)
    assert (first.code, second.code, second.stderr) == (-signal.SIGKILL, 1, "no\n")
    assert time.monotonic() - began < 290  # it didn't wait for the time to be over


@needs_namespaces
def test_ranks_that_hang_are_killed_when_the_time_is_over():
    with cluster(1) as where:
        (result,) = run_ranks(where, [sys.executable, "-c", "import time; time.sleep(600)"], timeout_s=0.5)
    assert result.code == -signal.SIGKILL


@needs_namespaces
def test_the_command_runs_on_every_rank():
    command = [sys.executable, "-m", "benchmarks.netns", "--ranks", "2", "--rate", "1000", "--"]
    inner = [sys.executable, "-c", "import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'])"]
    done = subprocess.run([*command, *inner], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 2\nrank 0: exit code 0, ")
    assert "rank 1: exit code 0" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_ranks": 0}, "num_ranks: expected 1 to 64, got 0"),
        ({"num_ranks": 2, "rate_mbit": 0.0}, "rate_mbit: expected 0.1 to 100000 Mbit/s, or None for no limit, got 0.0"),
        ({"num_ranks": 2, "mtu": 100}, "mtu: expected 576 to 65000 bytes, got 100"),
    ],
)
def test_numbers_that_make_no_cluster(arguments, says):
    with pytest.raises(ValueError, match=says), cluster(**arguments):
        pass


def test_without_the_tools(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert unusable() == "network namespaces: expected the command ip, found none; install iproute2"
    with pytest.raises(RuntimeError, match="install iproute2"), cluster(2):
        pass
