"""A small real cluster on one machine: ranks in network namespaces of their own, behind links of a known rate.

    python -m benchmarks.netns --ranks 4 --rate 1000 -- python -m equipoise bench links

Each rank's namespace has a veth link to a bridge, which is in a namespace too; tc's token bucket limits each link to a
rate in both directions. What goes over the links is counted by the kernel. Needs Linux, root, and iproute2.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

DEVICE = "eth0"  # the link's name inside each rank's namespace
PORT = 29500  # nobody else is in the namespace
BURST_S = 1e-4  # of the rate that may pass at once, and two packets at least: more, and small messages have no rate
QUEUE_S = 0.5  # of waiting before a link drops packets
MAX_RANKS = 64


@dataclass(frozen=True)
class Cluster:
    """Namespaces by rank with their addresses. rate_mbit: of each link and direction; None is as fast as it goes."""

    namespaces: tuple[str, ...]
    addresses: tuple[str, ...]
    rate_mbit: float | None
    mtu: int

    @property
    def seconds_per_byte(self) -> float:
        """At the least, on one link and direction."""
        return 0.0 if self.rate_mbit is None else 8 / (self.rate_mbit * 1e6)

    @property
    def burst_bytes(self) -> int:
        """That pass a link at once after a rest; 0 without a rate."""
        return 0 if self.rate_mbit is None else _burst(self.rate_mbit, self.mtu)


@dataclass(frozen=True)
class Wire:
    """Bytes that passed a rank's link, with all headers."""

    sent: int
    received: int


@dataclass(frozen=True)
class RankResult:
    """How one rank's process ended, what it wrote, and what its link carried meanwhile."""

    code: int
    stdout: str
    stderr: str
    wire: Wire


def unusable() -> str | None:
    """Why there can't be a cluster here, with the remedy; None where there can."""
    if sys.platform != "linux":
        return f"network namespaces: expected Linux, got {sys.platform}; run it on a Linux machine"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"network namespaces: expected the command {tool}, found none; install iproute2"
    if os.geteuid() != 0:
        return f"network namespaces: expected to run as root, got user {os.geteuid()}; try sudo"
    probe = f"equipoise-{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"network namespaces: the system refuses one ({done.stderr.strip()}); containers need CAP_SYS_ADMIN"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


@contextmanager
def cluster(num_ranks: int, rate_mbit: float | None = None, mtu: int = 1500) -> Iterator[Cluster]:
    """Namespaces for num_ranks ranks, gone at the end, also after an error or Ctrl-C.

    Their names begin with this process's number, and what a killed process left behind is removed first.
    Raises RuntimeError where it can't be done, ValueError for numbers that make no cluster.
    """
    if not 1 <= num_ranks <= MAX_RANKS:
        raise ValueError(f"num_ranks: expected 1 to {MAX_RANKS}, got {num_ranks}")
    if rate_mbit is not None and not 0.1 <= rate_mbit <= 100_000:
        raise ValueError(f"rate_mbit: expected 0.1 to 100000 Mbit/s, or None for no limit, got {rate_mbit}")
    if not 576 <= mtu <= 65_000:
        raise ValueError(f"mtu: expected 576 to 65000 bytes, got {mtu}")
    if reason := unusable():
        raise RuntimeError(reason)
    remove_leftovers()
    prefix = f"equipoise-{os.getpid()}-{time.monotonic_ns() % 1_000_000}"
    bridge, names = f"{prefix}-bridge", tuple(f"{prefix}-r{rank}" for rank in range(num_ranks))
    with ExitStack() as stack:
        for name in (bridge, *names):
            stack.callback(_remove, name)
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", bridge, "link", "add", "br0", "mtu", str(mtu), "type", "bridge")
        _run("ip", "-n", bridge, "link", "set", "br0", "up")
        addresses = tuple(f"10.77.0.{rank + 1}" for rank in range(num_ranks))
        for rank, (name, address) in enumerate(zip(names, addresses, strict=True)):
            _connect(name, address, bridge, f"port{rank}", mtu)
            if rate_mbit is not None:
                _limit(name, DEVICE, rate_mbit, mtu)  # what the rank sends
                _limit(bridge, f"port{rank}", rate_mbit, mtu)  # what it receives
        yield Cluster(names, addresses, rate_mbit, mtu)


def remove_leftovers() -> list[str]:
    """Remove the namespaces of processes that have died without doing so; return their names."""
    listed = _run("ip", "netns", "list").split()
    dead = [
        name
        for name in listed
        if (match := re.match(r"equipoise-(\d+)-", name)) and not Path(f"/proc/{match[1]}").exists()
    ]
    for name in dead:
        _remove(name)
    return dead


def run_ranks(
    where: Cluster, argv: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 300.0
) -> tuple[RankResult, ...]:
    """Run one process per rank, with the environment that torchrun gives and gloo on the rank's own link.

    When one fails, or after timeout_s, the others are killed: their code is minus the signal. Results by rank.
    """
    before = [wire(where, rank) for rank in range(len(where.namespaces))]
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = [[Path(folder) / f"{rank}.{stream}" for stream in ("out", "err")] for rank in range(len(before))]
        try:
            for rank in range(len(before)):
                processes.append(_start(where, rank, argv, env or {}, files[rank]))
            _wait(processes, timeout_s)
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its own session, so its children too
                process.wait()
        texts = [[file.read_text(encoding="utf-8", errors="replace") for file in pair] for pair in files]
    after = [wire(where, rank) for rank in range(len(before))]
    moved = [Wire(a.sent - b.sent, a.received - b.received) for a, b in zip(after, before, strict=True)]
    return tuple(
        RankResult(process.returncode, out, err, bytes_)
        for process, (out, err), bytes_ in zip(processes, texts, moved, strict=True)
    )


def wire(where: Cluster, rank: int) -> Wire:
    """What the rank's link has carried until now."""
    (link,) = json.loads(_run("ip", "-n", where.namespaces[rank], "-s", "-j", "link", "show", DEVICE))
    return Wire(link["stats64"]["tx"]["bytes"], link["stats64"]["rx"]["bytes"])


# ---------------------------------------------------------------------------------------------- parts


def _connect(name: str, address: str, bridge: str, port: str, mtu: int) -> None:
    """A link from the rank's namespace to a port of the bridge."""
    ends = ["netns", name, "type", "veth", "peer", "name", port, "netns", bridge]
    _run("ip", "link", "add", DEVICE, *ends)
    for namespace, device in ((name, DEVICE), (bridge, port)):
        _run("ip", "-n", namespace, "link", "set", device, "mtu", str(mtu))
    _run("ip", "-n", bridge, "link", "set", port, "master", "br0", "up")
    _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
    _run("ip", "-n", name, "link", "set", DEVICE, "up")


def _burst(rate_mbit: float, mtu: int) -> int:
    return int(max(2 * (mtu + 14), rate_mbit * 1e6 / 8 * BURST_S))


def _limit(namespace: str, device: str, rate_mbit: float, mtu: int) -> None:
    """A token bucket; the kernel cuts what it was handed in larger pieces."""
    burst = _burst(rate_mbit, mtu)
    queue = int(burst + max(2**17, rate_mbit * 1e6 / 8 * QUEUE_S))
    bucket = ["rate", f"{rate_mbit}mbit", "burst", str(burst), "limit", str(queue)]
    _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *bucket)


def _start(
    where: Cluster, rank: int, argv: Sequence[str], env: Mapping[str, str], files: Sequence[Path]
) -> subprocess.Popen[bytes]:
    world = len(where.namespaces)
    ranks = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": PORT}
    own = {name: str(value) for name, value in ranks.items()}
    own |= {"MASTER_ADDR": where.addresses[0], "GLOO_SOCKET_IFNAME": DEVICE, "CUDA_VISIBLE_DEVICES": ""}
    command = ["ip", "netns", "exec", where.namespaces[rank], *argv]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | own | env
    with files[0].open("wb") as out, files[1].open("wb") as err:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True)


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> None:
    """Until all have ended, one has failed, or the time is over."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return
        time.sleep(0.02)


def _remove(name: str) -> None:
    """Of a namespace, with the links that end in it; nothing where it was not made."""
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def main() -> None:
    """Run a command on every rank of a cluster; show rank 0's output, and what went over each link."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rate", type=float, metavar="MBIT", help="of each link in Mbit/s; without: no limit")
    parser.add_argument("--mtu", type=int, default=1500)
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    try:
        with cluster(options.ranks, options.rate, options.mtu) as where:
            results = run_ranks(where, options.command, timeout_s=options.timeout)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    sys.stdout.write(results[0].stdout)
    for rank, result in enumerate(results):
        print(f"rank {rank}: exit code {result.code}, {result.wire.sent:,} B sent, {result.wire.received:,} B received")
        sys.stderr.write(result.stderr if result.code or rank == 0 else "")
    sys.exit(max(abs(result.code) for result in results))


if __name__ == "__main__":
    main()
