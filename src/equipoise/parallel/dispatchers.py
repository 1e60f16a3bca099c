"""Dispatchers that span ranks: all-to-all in one hop or in two, and all-gather for tiny worlds.

`AllToAllDispatcher` sends each token once to each rank that it needs. `HierarchicalDispatcher` sends it once to each
node that it needs, to the rank in the same place there, which spreads it within the node (as DeepEP does). With
`AllGatherDispatcher` every rank gets every token: more bytes, fewer and simpler messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.layer.dispatch import Dispatched, UnderWay
from equipoise.layer.overflow import Fitted
from equipoise.ops.ragged import RaggedPlan, ragged_plan
from equipoise.parallel.exchange import AllGather, Meter, ReduceScatter, Started, start
from equipoise.parallel.payload import Payload
from equipoise.parallel.replicas import SlotTable
from equipoise.parallel.send import Arrived, Errands, Sent, Way, chunked, send


@dataclass(frozen=True, eq=False)
class Link:
    """What a layer's dispatcher needs to know of its surroundings.

    own_rank: in the expert group. num_slots: experts on this rank. table: where all are. payloads: out, and home.
    """

    own_rank: int
    num_slots: int
    table: SlotTable
    meter: Meter
    payloads: tuple[Payload, Payload]

    def errands(self, fitted: Fitted) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(token, rank, slot, weight) of each assignment that is computed, in the decision's order."""
        decision, keep_N = fitted.decision, fitted.keep_N
        token_N, expert_N, weights_N = decision.token_ids_N, decision.expert_ids_N, decision.weights_N
        if keep_N is not None:
            kept = keep_N.nonzero()[:, 0]
            token_N, expert_N, weights_N = token_N[kept], expert_N[kept], weights_N[kept]
        rank_N, slot_N = self.table.choose(token_N, expert_N, decision.num_tokens, self.own_rank)
        return token_N, rank_N, slot_N, weights_N


@dataclass(frozen=True, eq=False)
class Remote:
    """Rows from other ranks, for this rank's experts. See `Dispatched`. ways: the hops they came by, the last first."""

    rows: Tensor
    plan: RaggedPlan
    ways: tuple[Way, ...]

    def combine(self, y: Tensor) -> UnderWay[Tensor]:
        """Back by the way they came; a hop within a node is waited for here."""
        for way in self.ways[:-1]:
            y = way.send_home(y).wait()
        return self.ways[-1].send_home(y)


def _plan(arrived: Arrived, num_slots: int, fitted: Fitted) -> RaggedPlan:
    return ragged_plan(arrived.row_ids_N, arrived.labels_N, arrived.weights_N, num_slots, drops=fitted.drops)


@dataclass(frozen=True, eq=False)
class OneHop:
    """Tokens under way to their experts."""

    sent: Sent
    link: Link
    fitted: Fitted

    def wait(self) -> Dispatched:
        """What this rank's experts have to do."""
        arrived = self.sent.wait()
        return Remote(arrived.rows, _plan(arrived, self.link.num_slots, self.fitted), (arrived.way,))


class AllToAllDispatcher:
    """One copy of each token to each rank of the group that holds one of its experts.

    chunks: of tokens, the same number on all ranks; while one is computed, the next ones are under way.
    """

    def __init__(self, link: Link, group: dist.ProcessGroup, chunks: int = 1) -> None:
        self.link, self.group, self.chunks = link, group, chunks

    def dispatch(self, x_TD: Tensor, fitted: Fitted) -> Sequence[UnderWay[Dispatched]]:
        """Set off, all chunks."""
        errands = Errands(*self.link.errands(fitted))
        parts = [(x_TD, errands)] if self.chunks == 1 else chunked(x_TD, errands, self.chunks)
        meter, payloads = self.link.meter, self.link.payloads
        return [OneHop(send(x, part, self.group, meter, payloads), self.link, fitted) for x, part in parts]


@dataclass(frozen=True, eq=False)
class TwoHops:
    """Tokens under way to the nodes of their experts; within the node they are sent on at arrival."""

    sent: Sent
    dispatcher: HierarchicalDispatcher
    fitted: Fitted

    def wait(self) -> Dispatched:
        """What this rank's experts have to do, after the second hop."""
        link, at_node = self.dispatcher.link, self.sent.wait()
        local_N = at_node.labels_N % self.dispatcher.per_node
        errands = Errands(at_node.row_ids_N, local_N, at_node.labels_N // self.dispatcher.per_node, at_node.weights_N)
        arrived = send(at_node.rows, errands, self.dispatcher.within, link.meter, link.payloads).wait()
        return Remote(arrived.rows, _plan(arrived, link.num_slots, self.fitted), (arrived.way, at_node.way))


class HierarchicalDispatcher:
    """One copy of each token to each node, and from there one to each rank of the node.

    across: the ranks in the same place on all nodes, in the nodes' order. within: the ranks of this node. Ranks of the
    expert group are numbered node by node.
    """

    def __init__(self, link: Link, across: dist.ProcessGroup, within: dist.ProcessGroup) -> None:
        self.link, self.across, self.within = link, across, within
        self.per_node = dist.get_world_size(within)

    def dispatch(self, x_TD: Tensor, fitted: Fitted) -> Sequence[UnderWay[Dispatched]]:
        """Set off to the nodes."""
        token_N, rank_N, slot_N, weights_N = self.link.errands(fitted)
        label_N = slot_N * self.per_node + rank_N % self.per_node
        errands = Errands(token_N, rank_N // self.per_node, label_N, weights_N)
        return (TwoHops(send(x_TD, errands, self.across, self.link.meter, self.link.payloads), self, fitted),)


@dataclass(frozen=True, eq=False)
class Everything:
    """All ranks' rows, to the rank's own experts. See `Dispatched`. num_tokens: of this rank."""

    rows: Tensor
    plan: RaggedPlan
    num_tokens: int
    dispatcher: AllGatherDispatcher

    def combine(self, y: Tensor) -> UnderWay[Tensor]:
        """Sum over ranks, to each its own tokens."""
        link = self.dispatcher.link
        started = start(y, ReduceScatter(self.dispatcher.group), link.meter, link.payloads[1])
        return FirstRows(started, self.num_tokens)


@dataclass(frozen=True, eq=False)
class FirstRows:
    """The sums of a rank that has fewer tokens than the largest."""

    started: Started
    num_tokens: int

    def wait(self) -> Tensor:
        """y_TD."""
        return self.started.wait()[: self.num_tokens]


@dataclass(frozen=True, eq=False)
class Gathering:
    """All ranks' tokens under way to all ranks. width: rows per rank, num_errands: errands per rank, both the most."""

    rows: Started
    weights: Started
    told: Tensor
    told_work: dist.Work
    width: int
    num_tokens: int
    dispatcher: AllGatherDispatcher
    fitted: Fitted

    def wait(self) -> Dispatched:
        """Of all that came, what is for this rank's experts."""
        link = self.dispatcher.link
        rows, weights_N = self.rows.wait(), self.weights.wait()
        link.meter.wait(self.told_work)
        world = dist.get_world_size(self.dispatcher.group)
        token_N, rank_N, slot_N = self.told.long().unbind(1)
        first_N = torch.arange(world, device=rows.device).repeat_interleave(len(token_N) // world) * self.width
        mine_N = rank_N == link.own_rank  # padding is for rank -1
        plan = ragged_plan(
            (token_N + first_N)[mine_N], slot_N[mine_N], weights_N[mine_N], link.num_slots, drops=self.fitted.drops
        )
        return Everything(rows, plan, self.num_tokens, self.dispatcher)


class AllGatherDispatcher:
    """Every token to every rank, every sum from every rank: where messages cost more than bytes."""

    def __init__(self, link: Link, group: dist.ProcessGroup) -> None:
        self.link, self.group = link, group

    def dispatch(self, x_TD: Tensor, fitted: Fitted) -> Sequence[UnderWay[Dispatched]]:
        """Set off. Waits for the others to say how many tokens and assignments they have."""
        token_N, rank_N, slot_N, weights_N = self.link.errands(fitted)
        meter, gather = self.link.meter, AllGather(self.group)
        sizes, work = gather.forth(torch.tensor([[len(x_TD), len(token_N)]], device=x_TD.device), meter)
        meter.wait(work)
        width, most = sizes.amax(0).tolist()
        pad = torch.nn.functional.pad
        told_N3 = pad(torch.stack((token_N, rank_N, slot_N), dim=1).int(), (0, 0, 0, most - len(token_N)), value=-1)
        rows = start(pad(x_TD, (0, 0, 0, width - len(x_TD))), gather, meter, self.link.payloads[0])
        weights = start(pad(weights_N, (0, most - len(token_N))), gather, meter)
        told, told_work = gather.forth(told_N3, meter)
        return (Gathering(rows, weights, told, told_work, width, len(x_TD), self, fitted),)
