"""The processes of a server that torchrun has started, and a socket between the first and each of the others.

They find each other by torchrun's store. Sockets and not gloo: in each layer of each step somebody waits for a few
small messages, which take gloo several times as long, and with one connection it loses all.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from torch.distributed.rendezvous import rendezvous

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_WHERE = "equipoise/serve/front"  # in the store
_MAX_HELLO = 256  # bytes


@dataclass(frozen=True, eq=False)
class World:
    """size: processes. rank: of this one, from 0. sockets: of the first to all others by rank, of others to the first.

    timeout_s: until a message that does not come is an error.
    """

    rank: int
    size: int
    sockets: Mapping[int, socket.socket]
    timeout_s: float


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
    """This process among those of torchrun, connected, until the end.

    Raises ValueError for no time at all, and OSError when the others do not come within it.
    """
    if not 0 < timeout_s <= 1e6:
        raise ValueError(f"parallel.timeout_s: expected seconds, more than 0 and at most 1e6, got {timeout_s}")
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    host = os.environ["MASTER_ADDR"]
    with ExitStack() as stack:
        sockets = (
            _accepted(store, host, size, timeout_s) if rank == 0 else {0: _connected(store, host, rank, timeout_s)}
        )
        for each in sockets.values():
            stack.enter_context(each)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine may vanish without a word
        yield World(rank, size, sockets, timeout_s)


def _accepted(store: Store, host: str, size: int, timeout_s: float) -> dict[int, socket.socket]:
    """By rank. Whoever does not know what is in the store is turned away."""
    token = secrets.token_hex(16)
    sockets: dict[int, socket.socket] = {}
    with socket.create_server((host, 0), backlog=size) as server:
        server.settimeout(timeout_s)
        store.set(_WHERE, json.dumps({"port": server.getsockname()[1], "token": token}))
        while len(sockets) < size - 1:
            try:
                peer, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, size)) - set(sockets))
                raise OSError(f"ranks {missing} did not come within {timeout_s:g} s; look at their output") from None
            peer.settimeout(timeout_s)
            rank = _rank_of(peer, token)
            if rank is None or rank in sockets:
                peer.close()
            else:
                sockets[rank] = peer
    return sockets


def _rank_of(peer: socket.socket, token: str) -> int | None:
    """Of a peer that has the token; None for others."""
    try:
        with peer.makefile("rb") as file:
            given, _, rank = file.readline(_MAX_HELLO).decode("ascii", "replace").strip().partition(" ")
    except OSError:
        return None
    known = hmac.compare_digest(given.encode(), token.encode())
    return int(rank) if known and rank.isdecimal() else None


def _connected(store: Store, host: str, rank: int, timeout_s: float) -> socket.socket:
    where = json.loads(store.get(_WHERE))
    peer = socket.create_connection((host, where["port"]), timeout=timeout_s)
    peer.sendall(f"{where['token']} {rank}\n".encode())
    return peer
