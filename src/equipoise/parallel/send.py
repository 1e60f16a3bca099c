"""Tokens to the ranks of their experts, one copy per token and rank, whatever number of experts it has there.

`send` is one hop: rows and what is to be done with them go out, sums per row come home. Dispatchers are made of one
hop, or of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.layer.dispatch import UnderWay
from equipoise.parallel.exchange import AllToAll, Meter, Started, start
from equipoise.parallel.payload import Payload


@dataclass(frozen=True, eq=False)
class Errands:
    """What is to be done for rows: an entry per (row, expert).

    row_ids_N: int64, of the rows that they belong to. targets_N: int64, a rank of the group they travel in. labels_N:
    int64, what the target is told: a slot, or where to send it on. weights_N: fp32, with gradient.
    """

    row_ids_N: Tensor
    targets_N: Tensor
    labels_N: Tensor
    weights_N: Tensor


def chunked(x_TD: Tensor, errands: Errands, chunks: int) -> list[tuple[Tensor, Errands]]:
    """Consecutive rows with what is to be done for them, in so many parts of nearly one size, also empty ones."""
    parts = []
    bounds = [len(x_TD) * number // chunks for number in range(chunks + 1)]
    for first, end in pairwise(bounds):
        mine = ((errands.row_ids_N >= first) & (errands.row_ids_N < end)).nonzero()[:, 0]
        part = Errands(
            errands.row_ids_N[mine] - first, errands.targets_N[mine], errands.labels_N[mine], errands.weights_N[mine]
        )
        parts.append((x_TD[first:end], part))
    return parts


@dataclass(frozen=True, eq=False)
class Arrived:
    """Rows that came from all ranks of the group, in their order, and what is to be done for them.

    row_ids_N: int64, of `rows`. labels_N, weights_N: as they were sent. way: to send sums home by.
    """

    rows: Tensor
    row_ids_N: Tensor
    labels_N: Tensor
    weights_N: Tensor
    way: Way


@dataclass(frozen=True, eq=False)
class Way:
    """How a hop's rows went, to come home by. token_of_U: int64, the row that each copy was made of."""

    move: AllToAll
    token_of_U: Tensor
    num_tokens: int
    meter: Meter
    payload: Payload

    def send_home(self, y: Tensor) -> UnderWay[Tensor]:
        """From a sum per arrived row to one per row that was sent, over all ranks."""
        return Home(start(y, self.move.home, self.meter, self.payload), self)


@dataclass(frozen=True, eq=False)
class Home:
    """Sums under way to where their tokens are."""

    started: Started
    way: Way

    def wait(self) -> Tensor:
        """y_TD: each token's sums over the ranks that it was sent to, added up in at least fp32."""
        y_UD = self.started.wait()
        dtype = torch.promote_types(y_UD.dtype, torch.float32)
        total = y_UD.new_zeros(self.way.num_tokens, y_UD.shape[1], dtype=dtype)
        return total.index_add(0, self.way.token_of_U, y_UD.to(dtype)).to(y_UD.dtype)


@dataclass(frozen=True, eq=False)
class Sent:
    """A hop under way."""

    rows: Started
    weights: Started
    told: Tensor
    told_work: dist.Work
    rows_from: tuple[int, ...]
    errands_from: tuple[int, ...]
    way: Way

    def wait(self) -> Arrived:
        """What arrived."""
        rows, weights_N = self.rows.wait(), self.weights.wait()
        self.way.meter.wait(self.told_work)
        device = rows.device
        starts = torch.tensor(self.rows_from, device=device).cumsum(0) - torch.tensor(self.rows_from, device=device)
        first_N = starts.repeat_interleave(torch.tensor(self.errands_from, device=device))
        return Arrived(rows, self.told[:, 0].long() + first_N, self.told[:, 1].long(), weights_N, self.way)


def send(
    x_TD: Tensor,
    errands: Errands,
    group: dist.ProcessGroup,
    meter: Meter,
    payloads: tuple[Payload, Payload],
) -> Sent:
    """Set off. payloads: of the rows out, and of the sums home. Waits for the others to say how much will come."""
    num_tokens, world = len(x_TD), dist.get_world_size(group)
    # By target, then by row: a row's errands for one target are neighbours and share its copy.
    key_N = errands.targets_N * num_tokens + errands.row_ids_N
    order_N = torch.argsort(key_N, stable=True)
    key_N, target_N = key_N[order_N], errands.targets_N[order_N]
    is_new_N = torch.ones_like(key_N, dtype=torch.bool)
    is_new_N[1:] = key_N[1:] != key_N[:-1]
    copy_N = is_new_N.cumsum(0) - 1
    token_of_U = errands.row_ids_N[order_N][is_new_N]
    copies_W = torch.bincount(target_N[is_new_N], minlength=world)
    errands_W = torch.bincount(target_N, minlength=world)
    place_N = copy_N - (copies_W.cumsum(0) - copies_W)[target_N]

    amounts = torch.stack((copies_W, errands_W), dim=1)
    coming, work = AllToAll((1,) * world, (1,) * world, group).forth(amounts, meter)
    meter.wait(work)
    copies_out, errands_out = (tuple(column) for column in amounts.t().tolist())
    copies_in, errands_in = (tuple(column) for column in coming.t().tolist())

    move = AllToAll(copies_out, copies_in, group)
    errand_move = AllToAll(errands_out, errands_in, group)
    way = Way(move, token_of_U, num_tokens, meter, payloads[1])
    rows = start(x_TD[token_of_U], move, meter, payloads[0])
    weights = start(errands.weights_N[order_N], errand_move, meter)
    told, told_work = errand_move.forth(torch.stack((place_N, errands.labels_N[order_N]), dim=1).int(), meter)
    return Sent(rows, weights, told, told_work, copies_in, errands_in, way)
