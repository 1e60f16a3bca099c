"""Collectives that are under way while other work is done, forward and backward.

A `Move` says how rows travel, and back. `start` sets it off and returns at once; `wait` on what it returned gives the
rows. In backward the order is the other way round: the gradient sets off where the forward waited, and is waited for
where the forward set off, so that what hid the one hides the other. Nothing here knows of experts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.parallel.payload import AS_IS, Payload


class CollectiveError(RuntimeError):
    """Ranks did not meet, or one of them has gone. The message names the rank and the layer, and what to look at."""


class Meter:
    """What one layer's exchanges cost on this rank, since it was last taken.

    seconds: in which this rank could do nothing but wait. sent_bytes: payload to other ranks, without itself.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds, self.sent_bytes = 0.0, 0

    def take(self) -> tuple[float, int]:
        """(seconds, bytes), and a fresh start."""
        taken = self.seconds, self.sent_bytes
        self.seconds, self.sent_bytes = 0.0, 0
        return taken

    def wait(self, work: dist.Work) -> None:
        """Until it has ended. Raises CollectiveError when it does not."""
        begun = time.perf_counter()
        try:
            work.wait()
        except RuntimeError as error:
            raise CollectiveError(
                f"rank {dist.get_rank()}, {self.name}: an exchange with the other ranks did not end ({_first(error)}). "
                "A rank has died, hangs, or runs other code: look at the last lines of every rank's output"
            ) from error
        self.seconds += time.perf_counter() - begun


def sum_over(tensor: Tensor, group: dist.ProcessGroup, what: str) -> None:
    """Sum over the ranks of a group, in place. what: for the message of the CollectiveError."""
    work = dist.all_reduce(tensor, group=group, async_op=True)
    assert work is not None
    Meter(what).wait(work)


def _first(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


class Move(Protocol):
    """How rows travel between the ranks of a group. A tensor's first axis is its rows."""

    def forth(self, x: Tensor, meter: Meter) -> tuple[Tensor, dist.Work]:
        """(where the rows will be, what to wait for)."""
        ...

    def back(self, y: Tensor, meter: Meter) -> tuple[Tensor, dist.Work]:
        """The way back, for gradients: of what `forth` gave, to what it took."""
        ...


@dataclass(frozen=True, eq=False)
class AllToAll:
    """Each rank sends some rows to each, in the order of ranks. send, receive: rows to and from each rank."""

    send: tuple[int, ...]
    receive: tuple[int, ...]
    group: dist.ProcessGroup

    def forth(self, x: Tensor, meter: Meter) -> tuple[Tensor, dist.Work]:
        """Rows to their ranks."""
        return self._go(x, self.send, self.receive, meter)

    def back(self, y: Tensor, meter: Meter) -> tuple[Tensor, dist.Work]:
        """Each row to where it came from."""
        return self._go(y, self.receive, self.send, meter)

    @property
    def home(self) -> AllToAll:
        """The move of results: the other way."""
        return AllToAll(self.receive, self.send, self.group)

    def _go(self, x: Tensor, send: tuple[int, ...], receive: tuple[int, ...], meter: Meter) -> tuple[Tensor, dist.Work]:
        out = x.new_empty(sum(receive), *x.shape[1:])
        row = x[:1].numel() * x.element_size() if len(x) else 0
        meter.sent_bytes += row * (len(x) - send[dist.get_rank(self.group)])
        work = dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=self.group, async_op=True)
        assert work is not None
        return out, work


@dataclass(frozen=True, eq=False)
class AllGather:
    """All ranks get all ranks' rows, of which each rank has the same number. Gradients are summed to their owners."""

    group: dist.ProcessGroup

    def forth(self, x: Tensor, meter: Meter) -> tuple[Tensor, dist.Work]:
        """(world * rows, ...)."""
        world = dist.get_world_size(self.group)
        out = x.new_empty(world * len(x), *x.shape[1:])
        meter.sent_bytes += (world - 1) * x.numel() * x.element_size()
        work = dist.all_gather_single(out, x.contiguous(), group=self.group, async_op=True)
        assert work is not None
        return out, work

    def back(self, y: Tensor, meter: Meter) -> tuple[Tensor, dist.Work]:
        """This rank's share of the sum over ranks."""
        world = dist.get_world_size(self.group)
        out = y.new_empty(len(y) // world, *y.shape[1:])
        meter.sent_bytes += (world - 1) * out.numel() * out.element_size()
        work = dist.reduce_scatter_single(out, y.contiguous(), group=self.group, async_op=True)
        assert work is not None
        return out, work


@dataclass(frozen=True, eq=False)
class ReduceScatter:
    """The sum over ranks, to each rank its rows: `AllGather` the other way."""

    group: dist.ProcessGroup

    def forth(self, x: Tensor, meter: Meter) -> tuple[Tensor, dist.Work]:
        """(rows / world, ...)."""
        return AllGather(self.group).back(x, meter)

    def back(self, y: Tensor, meter: Meter) -> tuple[Tensor, dist.Work]:
        """Everyone's rows to everyone."""
        return AllGather(self.group).forth(y, meter)


class _Flight:
    """One exchange and its gradient's: what is on the way, and what has to be kept until it is there."""

    def __init__(self, move: Move, meter: Meter, payload: Payload) -> None:
        self.move, self.meter, self.payload = move, meter, payload
        self.dtype: torch.dtype | None = None
        self._out: Tensor | None = None
        self._kept: tuple[Tensor, dist.Work] | None = None

    def set_off(self, x: Tensor, *, forward: bool) -> Tensor:
        """Start; where the result will be, in the type that travels."""
        if forward:
            self.dtype = x.dtype
        packed = (self.payload.pack if forward else self.payload.pack_gradient)(x)
        self._out, work = (self.move.forth if forward else self.move.back)(packed, self.meter)
        self._kept = packed, work
        return self._out

    def land(self, *, forward: bool) -> Tensor:
        """Wait; the result in the type that it had."""
        assert self._kept is not None
        assert self._out is not None
        assert self.dtype is not None
        self.meter.wait(self._kept[1])
        out, self._kept, self._out = self._out, None, None
        return (self.payload.unpack if forward else self.payload.unpack_gradient)(out, self.dtype)


class _SetOff(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.set_off(x, forward=True)
        return x.new_empty(0)  # stands for the flight in the graph

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.land(forward=False), None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.land(forward=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.flight.set_off(grads[0], forward=False)
        return grads[0].new_zeros(0), None


@dataclass(frozen=True, eq=False)
class Started:
    """An exchange under way. See `UnderWay` of the layer's dispatchers."""

    ticket: Tensor
    flight: _Flight

    def wait(self) -> Tensor:
        """The rows that arrived, with their gradient."""
        rows: Tensor = _Land.apply(self.ticket, self.flight)  # type: ignore[no-untyped-call]  # torch's
        return rows


def start(x: Tensor, move: Move, meter: Meter, payload: Payload = AS_IS) -> Started:
    """Set off. x: rows, any floating type if a gradient goes back; the same graph on all ranks, also without rows."""
    flight = _Flight(move, meter, payload)
    ticket: Tensor = _SetOff.apply(x, flight)  # type: ignore[no-untyped-call]  # torch's
    return Started(ticket, flight)
