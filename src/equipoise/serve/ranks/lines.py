"""Messages between the front of a server and the ranks that hold its experts: one line each, no two holders talk.

So whoever does not answer has a name. A message is a header, five numbers that say what is wanted and how much follows,
and then that. Nothing here knows what is computed.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.parallel.exchange import CollectiveError
from equipoise.serve.ranks.world import World

COMPUTE, FETCH, ASK = range(3)
_FOREVER = timedelta(days=3650)  # a front that ends closes its connections, and is noticed at once
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
        self._group = world.group
        self._going: list[tuple[Tensor, dist.Work]] = []
        self._coming: list[dist.Work] = []

    def send(self, *tensors: Tensor) -> None:
        """Set off; `sent` waits. The tensors must be contiguous, on the CPU, and stay as they are until then."""
        for tensor in tensors:
            if tensor.numel():
                with self._named():
                    work = dist.isend(tensor, self.peer, group=self._group)
                assert work is not None
                self._going.append((tensor, work))
                self.sent_bytes += tensor.nbytes

    def sent(self) -> None:
        """Until all that was sent is on its way."""
        for _, work in self._going:
            with self._named():
                work.wait()
        self._going.clear()

    def expect(self, out: Tensor) -> Callable[[], Tensor]:
        """Begin to receive into `out`; what it returns waits, and gives it."""
        if not out.numel():
            return lambda: out
        with self._named():
            work = dist.irecv(out, self.peer, group=self._group)
        assert work is not None
        self._coming.append(work)

        def wait() -> Tensor:
            began = time.perf_counter()
            with self._named():
                work.wait()
            self._coming.remove(work)
            self.seconds += time.perf_counter() - began
            return out

        return wait

    def settled(self) -> None:
        """Until nothing is under way any more, both ways."""
        while self._coming:
            with self._named():
                self._coming.pop().wait()
        self.sent()

    def header(self, *, forever: bool = False) -> Header:
        """Wait for the next one. forever: however long nothing is wanted."""
        out = torch.empty(5, dtype=torch.int64)
        with self._named():
            work = dist.irecv(out, self.peer, group=self._group)
            assert work is not None
            work.wait(_FOREVER) if forever else work.wait()
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

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise CollectiveError(
                f"{self.name} does not answer ({_short(error)}). It has died, hangs, or can't be reached: look at the "
                "last lines of its output, and start the server again"
            ) from error


def _short(error: BaseException) -> str:
    """Without the place in gloo's source, and its guesses."""
    return re.sub(r"^\[[^\]]*\] *", "", str(error).strip()).split("\n")[0].split(". ")[0][:120]


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
            answers = [line.json(line.header()) for line in lines]
            for line in lines:
                line.sent()
            return answers

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
