"""Messages between the front of a server and the ranks that hold its experts: one line each, no two holders talk.

So whoever does not answer has a name. A message is a header, five numbers that say what is wanted and how much follows,
and then that. Nothing here knows what is computed.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.parallel.exchange import CollectiveError
from equipoise.serve.ranks.world import World

COMPUTE, FETCH, ASK = range(3)
Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Header:
    """What is wanted. COMPUTE: layer, its number; rows and errands that follow, in a type (`disk.rows.DTYPES`).

    FETCH: layer, and a slot in `rows`. ASK: `rows` bytes of JSON.
    """

    verb: int
    layer: int = 0
    rows: int = 0
    errands: int = 0
    dtype: int = 0

    def packed(self) -> Tensor:
        """int64 (5,)."""
        return torch.tensor((self.verb, self.layer, self.rows, self.errands, self.dtype))


class Line:
    """To one other process. name: what it is called in errors."""

    def __init__(self, peer: int, world: World) -> None:
        self.peer, self.name = peer, f"rank {peer}"
        self.seconds, self.sent_bytes = 0.0, 0  # waited for it, and sent to it, so far
        self._socket, self._timeout_s = world.sockets[peer], world.timeout_s
        self._coming: list[Tensor] = []

    def send(self, *tensors: Tensor) -> None:
        """They must be contiguous, and on the CPU. Waits for the other side only where they are many."""
        with self._named():
            views = [_bytes(tensor) for tensor in tensors if tensor.numel()]
            self.sent_bytes += sum(map(len, views))
            while views:  # in one call, and so in one message, where the system takes all of it
                sent = self._socket.sendmsg(views)
                while views and sent >= len(views[0]):
                    sent -= len(views.pop(0))
                if views:
                    views[0] = views[0][sent:]

    def expect(self, out: Tensor) -> Callable[[], Tensor]:
        """`out` is what comes next; what it returns waits for it, and gives it. Waits are in the order of these."""
        self._coming.append(out)

        def wait() -> Tensor:
            began = time.perf_counter()
            with self._named():
                self._receive(out)
            self._coming.pop(0)
            self.seconds += time.perf_counter() - began
            return out

        return wait

    def settled(self) -> None:
        """Receive what is expected and nobody has waited for."""
        while self._coming:
            with self._named():
                self._receive(self._coming.pop(0))

    def header(self, *, forever: bool = False) -> Header:
        """Wait for the next one. forever: however long nothing is wanted."""
        out = torch.empty(5, dtype=torch.int64)
        with self._named():
            self._socket.settimeout(None if forever else self._timeout_s)
            self._receive(out)
            self._socket.settimeout(self._timeout_s)
        return Header(*out.tolist())

    def send_json(self, value: Answer) -> None:
        """As ASK."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        self.send(Header(ASK, rows=len(text)).packed(), text)

    def json(self, header: Header) -> Answer:
        """What follows the header of an ASK."""
        text = self.expect(torch.empty(header.rows, dtype=torch.uint8))()
        answer: Answer = json.loads(text.numpy().tobytes())
        return answer

    def _receive(self, out: Tensor) -> None:
        view = _bytes(out)
        while len(view):
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionError("it has closed the connection")
            view = view[count:]

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CollectiveError(
                f"{self.name} does not answer ({error}). It has died, hangs, or can't be reached: look at the last "
                "lines of its output, and start the server again"
            ) from error


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


class Lines:
    """The front's, to all others. Whoever uses them takes a turn, from any thread; after the first loss none is given.

    lost: who does not answer, in a sentence; empty while all do. on_lost: called once, when it is known.
    """

    def __init__(self, world: World) -> None:
        self.all = tuple(Line(peer, world) for peer in range(world.size) if peer != world.rank)
        self.lost = ""
        self.on_lost: Callable[[], None] = lambda: None
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._pulse: threading.Thread | None = None

    @contextmanager
    def turn(self) -> Iterator[Sequence[Line]]:
        """Nobody else's messages come between. Raises CollectiveError, naming the rank, once one is lost."""
        with self._lock:
            if self.lost:
                raise CollectiveError(self.lost)
            try:
                yield self.all
            except CollectiveError as error:
                self.lost = self.lost or str(error)
                self.on_lost()
                raise

    def ask(self, **command: Any) -> list[Answer]:
        """All others at once, and their answers in order. Raises ValueError, naming the rank, for what one refuses."""
        answers = self.ask_each([command] * len(self.all))
        for line, answer in zip(self.all, answers, strict=True):
            if problem := answer.get("error"):
                raise ValueError(f"{line.name}: {problem}")
        return answers

    def ask_each(self, commands: Sequence[Answer]) -> list[Answer]:
        """Another command for each; the answers, also those that are refusals, under `error`."""
        with self.turn() as lines:
            for line, command in zip(lines, commands, strict=True):
                line.send_json(command)
            return [line.json(line.header()) for line in lines]

    def watch(self, period_s: float, told: Callable[[], Answer] = dict) -> None:
        """From now on ask them every so often whether they are there. told: what else they are told then."""

        def beat() -> None:
            while not self._over.wait(period_s):
                try:
                    self.ask(do="ping", **told())
                except CollectiveError:
                    return  # `lost` says who

        self._pulse = threading.Thread(target=beat, name="pulse", daemon=True)
        self._pulse.start()

    def close(self) -> None:
        """Tell those that are there to end."""
        self._over.set()
        if self._pulse is not None:
            self._pulse.join()
        if not self.lost:
            self.ask(do="stop")
            return
        for line in self.all:
            try:
                line.settled()
                line.send_json({"do": "stop"})
                line.json(line.header())
            except CollectiveError:
                continue  # it is the lost one, or can't be told any more
