"""Experts most of which are in other processes. It stands where `layer.Experts` stands, and computes the same.

Rows set off to the ranks that hold their experts, this rank's own are computed meanwhile, and sums per row come home.
For inference: there is no way back for a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from equipoise.layer import Experts
from equipoise.layer.probed_experts import ExpertProbe
from equipoise.ops.ragged import RaggedPlan, ragged_plan
from equipoise.parallel.payload import Payload
from equipoise.parallel.replicas import SlotTable, slot_table
from equipoise.serve.ranks.lines import COMPUTE, FETCH, Header, Line, Lines
from equipoise.serve.ranks.parcel import TYPES, Parcel, packed_like, parcel
from equipoise.types import Placement


@dataclass(frozen=True, eq=False)
class Reach:
    """How a layer's experts are reached. number: of the layer. payloads: of rows out, and of sums home."""

    lines: Lines
    number: int
    placement: Placement
    payloads: tuple[Payload, Payload]


class RemoteExperts(nn.Module):
    """All experts of a layer, of which rank 0 holds `local`. See `Experts` for what is there besides `forward`."""

    probes: tuple[ExpertProbe, ...] = ()

    def __init__(self, local: Experts, reach: Reach) -> None:
        super().__init__()
        self.local, self.activation, self._reach = local, local.activation, reach
        self._table: SlotTable = slot_table(reach.placement)
        self._own = len(reach.placement.slots[0])

    @property
    def num_experts(self) -> int:
        """E, all of them."""
        return self._reach.placement.num_experts

    @property
    def biases(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """Those of this rank's, or None."""
        return self.local.biases

    @property
    def dim(self) -> int:
        """D, model dim."""
        return self.local.dim

    @property
    def hidden_dim(self) -> int:
        """F, of each expert."""
        return self.local.hidden_dim

    @property
    def device(self) -> torch.device:
        """Where this rank's experts are."""
        return self.local.device

    @property
    def dtype(self) -> torch.dtype:
        """That their products are computed in."""
        return self.local.dtype

    def weights_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """(up (H, D), down (D, F)) of one expert, fetched where another rank holds it."""
        rank, slot = int(self._table.ranks_EM[expert, 0]), int(self._table.slots_EM[expert, 0])
        if rank == 0:
            return self.local.weights_of(slot)
        with self._reach.lines.turn() as lines:
            line = lines[rank - 1]
            line.send(Header(FETCH, self._reach.number, slot).packed())
            rooms = [torch.empty(each.shape[1:], dtype=self.dtype) for each in (self.local.up, self.local.down_proj)]
            up_HD, down_DF = [line.expect(room)() for room in rooms]
        return up_HD.to(self.device), down_DF.to(self.device)

    def forward(self, x_TD: Tensor, plan: RaggedPlan) -> Tensor:
        """(T, D) in x's dtype. Raises ValueError with probes, and CollectiveError that names a rank which is lost."""
        if self.probes:
            raise ValueError(
                "probes: expected none on experts that are spread over ranks, which compute theirs at the same time; "
                "time whole layers"
            )
        ranks_N, token_ids_N, slots_N, weights_N = self._errands(plan, len(x_TD))
        with self._reach.lines.turn() as lines:
            under_way = []
            for line in lines:
                mine = np.flatnonzero(ranks_N == line.peer)
                if len(mine):
                    under_way.append(self._send(line, x_TD, parcel(token_ids_N[mine], slots_N[mine], weights_N[mine])))
            y_TD = self._compute(x_TD, np.flatnonzero(ranks_N == 0), token_ids_N, slots_N, weights_N)
            for come_home in under_way:
                come_home(y_TD)
        return y_TD.to(x_TD.dtype)

    def _errands(self, plan: RaggedPlan, num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(rank, token, slot there, weight) of what is to be computed, on the host."""
        counts = plan.counts_e.cpu()
        expert_ids_N = torch.repeat_interleave(torch.arange(len(counts)), counts)
        token_ids_N = plan.token_ids_R[: len(expert_ids_N)].cpu()
        ranks_N, slots_N = self._table.choose(token_ids_N, expert_ids_N, num_tokens, own_rank=0)
        weights_N = plan.weights_R[: len(expert_ids_N)].float().cpu()
        return ranks_N.numpy(), token_ids_N.numpy(), slots_N.numpy(), weights_N.numpy()

    def _send(self, line: Line, x_TD: Tensor, sent: Parcel) -> Callable[[Tensor], None]:
        """Set off; what it returns waits, and adds the sums that come home to a total."""
        out, home = self._reach.payloads
        rows_UD = out.pack(x_TD[sent.token_ids_U.to(x_TD.device)]).cpu().contiguous()
        number, dtype = self._reach.number, x_TD.dtype
        header = Header(COMPUTE, number, len(rows_UD), len(sent.errands_N3), TYPES.index(dtype))
        line.send(header.packed(), sent.errands_N3, rows_UD)
        come = line.expect(packed_like(home, len(rows_UD), self.dim, dtype))

        def add(y_TD: Tensor) -> None:
            y_UD = home.unpack(come(), dtype)
            y_TD.index_add_(0, sent.token_ids_U.to(y_TD.device), y_UD.to(y_TD.device, y_TD.dtype))

        return add

    def _compute(
        self, x_TD: Tensor, mine: np.ndarray, token_ids_N: np.ndarray, slots_N: np.ndarray, weights_N: np.ndarray
    ) -> Tensor:
        """This rank's part of the sums, in at least fp32, where the others' are added."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        if not len(mine):
            return x_TD.new_zeros(x_TD.shape, dtype=dtype)
        tokens_n, slots_n, weights_n = (
            torch.from_numpy(each[mine]).to(x_TD.device) for each in (token_ids_N, slots_N, weights_N)
        )
        y_TD: Tensor = self.local(x_TD, ragged_plan(tokens_n, slots_n, weights_n, self._own))
        return y_TD.to(dtype)

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"num_experts={self.num_experts}, on {self._reach.placement.num_ranks} ranks, {self._own} here"


def put_in(layers: Mapping[str, nn.Module], experts: Mapping[str, RemoteExperts]) -> None:
    """In place of the layers' experts."""
    for name, each in experts.items():
        layers[name].register_module("experts", each)
