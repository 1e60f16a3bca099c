"""The stacked experts and the choice of the code that multiplies them.

Layout as in transformers 5: gate_up_proj (e, 2F, D), gate first; down_proj (e, D, F). Backends are functions of one
signature; "auto" takes the one that measured fastest for the device, and `backend_for` says which and why.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from equipoise.layer.probed_experts import ExpertProbe, probed_experts
from equipoise.ops import reference
from equipoise.ops.activation import activate, check_activation, is_gated, pre_activation_dim
from equipoise.ops.custom_experts import ExpertWeights, lean_custom_experts
from equipoise.ops.few_rows import few_rows, few_rows_experts
from equipoise.ops.grouped_experts import grouped_experts, grouped_mm_supports
from equipoise.ops.lean_experts import lean_experts
from equipoise.ops.native.experts import native_experts, why_not_native
from equipoise.ops.native.few import few_native_experts, is_few, unsupported_plain
from equipoise.ops.ragged import RaggedPlan, Sort
from equipoise.ops.triton.experts import triton_experts
from equipoise.ops.triton.needs import why_not_triton
from equipoise.ops.triton.order import sort_by_key

BackendName = Literal["auto", "lean", "native", "few", "native_few", "grouped", "triton", "reference"]
Backend = Callable[[Tensor, RaggedPlan, Tensor, Tensor, str], Tensor]


def reference_experts(x_TD: Tensor, plan: RaggedPlan, up_eHD: Tensor, down_eDF: Tensor, activation: str) -> Tensor:
    """The slow twin behind the backends' signature: `ops.reference.experts` on the plan's rows."""
    num_rows = int(plan.counts_e.sum())
    expert_ids_R = torch.repeat_interleave(torch.arange(len(plan.counts_e), device=x_TD.device), plan.counts_e)
    return reference.experts(
        x_TD,
        plan.token_ids_R[:num_rows],
        expert_ids_R,
        plan.weights_R[:num_rows],
        up_eHD,
        down_eDF,
        check_activation(activation),
    )


BACKENDS: dict[str, Backend] = {
    "lean": lean_experts,
    "native": native_experts,
    "few": few_rows_experts,
    "native_few": few_native_experts,
    "grouped": grouped_experts,
    "triton": triton_experts,
    "reference": reference_experts,
}


def backend_for(
    name: BackendName,
    x_TD: Tensor,
    up_eHD: Tensor,
    down_eDF: Tensor,
    num_rows: int | None = None,
    activation: str = "swiglu",
) -> tuple[str, str]:
    """(backend, reason) that `name` means for these tensors. num_rows: R; None is many.

    The rule for "auto" comes from `equipoise bench layer` and `decode`. On a CPU, without gradients, few rows go
    through one call in C++ where it can run, else through few operators. All others go through the products in C++
    where they can run (docs/native.md), else the lean loop. On a GPU a loop over experts would wait for the host:
    Triton's kernels are taken where they can run and were measured (docs/gpu.md), else grouped_mm where it can run.
    Where they can't run, "native" is "lean", and "native_few" is "few".
    """
    if name == "native" and (missing := why_not_native(x_TD, up_eHD, down_eDF, activation)):
        return "lean", f"native was asked for, but {missing}"
    if name == "native_few" and (missing := _why_not_native_few(x_TD, up_eHD, down_eDF, activation)):
        return "few", f"native_few was asked for, but {missing}"
    if name != "auto":
        return name, "asked for"
    if x_TD.device.type == "cpu":
        return _backend_on_a_cpu(x_TD, up_eHD, down_eDF, num_rows, activation)
    if not why_not_triton(x_TD, down_eDF):
        return "triton", "fastest on a GPU, keeps the least for backward, no host synchronisation"
    if reason := grouped_mm_supports(x_TD, up_eHD, down_eDF):
        return "lean", reason
    return "grouped", "one kernel for all experts, no host synchronisation"


def _backend_on_a_cpu(
    x_TD: Tensor, up_eHD: Tensor, down_eDF: Tensor, num_rows: int | None, activation: str
) -> tuple[str, str]:
    if num_rows is not None and not _keeps_gradients_or_graph():
        why_not = "too many rows"
        if is_few(num_rows, len(up_eHD)):
            why_not = _why_not_native_few(x_TD, up_eHD, down_eDF, activation)
        if not why_not:
            return "native_few", "one native call, without gradients"
        if few_rows(num_rows, up_eHD):
            return "few", f"fewest operators, without gradients; {why_not}"
    if missing := why_not_native(x_TD, up_eHD, down_eDF, activation):
        return "lean", f"fastest in training on a CPU, keeps the least for backward; {missing}"
    return "native", "C++, fastest on a CPU, keeps the least for backward"


def _why_not_native_few(x_TD: Tensor, up_eHD: Tensor, down_eDF: Tensor, activation: str) -> str:
    if _keeps_gradients_or_graph():
        return "it has no gradients, and stands in no graph"
    return unsupported_plain(x_TD, up_eHD, down_eDF, activation)


def sort_for(name: BackendName) -> Sort | None:
    """Who sorts assignments for a backend, None for `ragged_plan`'s choice."""
    return sort_by_key if name == "triton" else None


def _keeps_gradients_or_graph() -> bool:
    """Whether a backward pass may come, for which little is kept, or a graph is traced, which can't read counts."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


class Experts(nn.Module):
    """E feed-forward networks, stacked. Computes each row's weighted sum over its experts.

    bias: both projections have one, up_bias (e, H) and down_bias (e, D); such experts have the lean loop as the only
    backend.
    probes: observers of single experts; with any, experts are computed one by one, for these observers to time.
    What else stands in a layer's `experts` has, besides `forward`, these: probes, activation, the properties of sizes
    and types below, and `weights_of`.
    """

    probes: tuple[ExpertProbe, ...] = ()

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        activation: str = "swiglu",
        backend: BackendName = "auto",
        bias: bool = False,
    ) -> None:
        super().__init__()
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend: expected auto, {', '.join(BACKENDS)}, got {backend!r}")
        self.activation = check_activation(activation)
        self.backend: BackendName = backend
        inner = pre_activation_dim(hidden_dim, self.activation)
        up_proj = nn.Parameter(torch.empty(num_experts, inner, dim))
        if is_gated(self.activation):
            self.gate_up_proj = up_proj
        else:
            self.up_proj = up_proj
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.up_bias = nn.Parameter(torch.empty(num_experts, inner)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        self.init_weights(0.02, 0.02)

    @property
    def up(self) -> nn.Parameter:
        """(e, H, D): the inner projection, gated or not."""
        return self.gate_up_proj if is_gated(self.activation) else self.up_proj

    @property
    def biases(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """(e, H) and (e, D), or None."""
        return None if self.up_bias is None or self.down_bias is None else (self.up_bias, self.down_bias)

    @property
    def num_experts(self) -> int:
        """E, or those on this rank."""
        return self.down_proj.shape[0]

    @property
    def dim(self) -> int:
        """D, model dim."""
        return self.down_proj.shape[1]

    @property
    def hidden_dim(self) -> int:
        """F, of each expert."""
        return self.down_proj.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        return self.down_proj.device

    @property
    def dtype(self) -> torch.dtype:
        """That their products are computed in, outside autocast."""
        return self.down_proj.dtype

    def weights_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """(up (H, D), down (D, F)) of one expert, without gradient: for whoever looks at weights."""
        return self.up.detach()[expert], self.down_proj.detach()[expert]

    def init_weights(self, std: float, output_std: float) -> None:
        """Normal values: std for the inner projection, output_std for the one that writes into the residual."""
        nn.init.normal_(self.up, std=std)
        nn.init.normal_(self.down_proj, std=output_std)
        for bias in self.biases or ():
            nn.init.zeros_(bias)

    def forward(self, x: Tensor, plan: RaggedPlan) -> Tensor:
        """(T, D) in x's dtype. Under autocast the products run in its dtype: the operators below don't see autocast."""
        up, down, out_dtype = self.up, self.down_proj, x.dtype
        compute_dtype = torch.promote_types(x.dtype, up.dtype)
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):  # the meta device has none
            compute_dtype = torch.get_autocast_dtype(device)
        x, up_c, down_c = x.to(compute_dtype), up.to(compute_dtype), down.to(compute_dtype)
        biases = self.biases and (self.biases[0].to(compute_dtype), self.biases[1].to(compute_dtype))
        if self.probes:
            return probed_experts(x, plan, up_c, down_c, self.activation, self.probes, biases).to(out_dtype)
        if biases:
            weights = ExpertWeights(up_c, down_c, *biases)
            y_TD: Tensor = lean_custom_experts(x, plan, weights, partial(activate, activation=self.activation))
            return y_TD.to(out_dtype)
        name, _ = backend_for(self.backend, x, up_c, down_c, len(plan.token_ids_R), self.activation)
        return BACKENDS[name](x, plan, up_c, down_c, self.activation).to(out_dtype)

    def extra_repr(self) -> str:
        """Shown by print(module): sizes, and which backend these parameters get and why."""
        e, D, F = self.num_experts, self.dim, self.hidden_dim
        name, reason = backend_for(self.backend, self.up[0], self.up, self.down_proj, activation=self.activation)
        return f"num_experts={e}, dim={D}, hidden_dim={F}, activation={self.activation}, backend={name} ({reason})"
