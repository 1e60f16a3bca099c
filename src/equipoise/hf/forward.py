"""The forward of an experts module of transformers, computed by equipoise's expert products.

Same arguments and result as transformers:integrations/moe.py:grouped_mm_experts_forward. An expert number of E or above
stands for an expert on another rank, as there: its row is not computed.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.hf.layout import flag, layout_of, stacked_weights
from equipoise.ops.custom_experts import ExpertWeights, grouped_custom_experts, lean_custom_experts
from equipoise.ops.few_rows import few_rows, few_rows_experts
from equipoise.ops.grouped_experts import grouped_experts, grouped_mm_supports
from equipoise.ops.lean_experts import lean_experts
from equipoise.ops.native.experts import native_experts, why_not_native
from equipoise.ops.native.few import few_native_experts, is_few, unsupported_plain
from equipoise.ops.ragged import RaggedPlan, ragged_plan

PLAIN = {
    "lean": lean_experts,
    "native": native_experts,
    "few": few_rows_experts,
    "native_few": few_native_experts,
    "grouped": grouped_experts,
}
# Nothing to trace in the lean one: it reads counts on the host.
_lean = torch.compiler.disable(lean_custom_experts)  # type: ignore[no-untyped-call]  # torch's
CUSTOM = {"lean": _lean, "grouped": grouped_custom_experts}


def equipoise_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """(T, D) in the dtype of hidden_states (T, D): each token's weighted sum over its K experts.

    top_k_index: integers (T, K). top_k_weights: (T, K), floating. Products run in the weights' dtype, or autocast's.
    What our functions lack something for, transformers' grouped_mm computes, with a RuntimeWarning.
    """
    layout = layout_of(self)
    if layout.missing is not None:
        return _by_transformers(self, layout.missing, hidden_states, top_k_index, top_k_weights)
    weights = _in_compute_dtype(stacked_weights(self), hidden_states.device.type)
    x_TD = hidden_states.to(weights.up_eHD.dtype)
    plan = _plan(top_k_index, top_k_weights, len(weights.up_eHD))
    plain = layout.plain and not _are_frozen(weights)
    name = backend_for(plain, x_TD, weights, len(plan.token_ids_R))
    if plain:
        y_TD = PLAIN[name](x_TD, plan, weights.up_eHD, weights.down_eDF, "swiglu")
    else:
        activation: Any = self._apply_gate if flag(self, "has_gate") else self.act_fn
        y_TD = CUSTOM[name](x_TD, plan, weights, activation)
    return y_TD.to(hidden_states.dtype)


def backend_for(plain: bool, x_TD: Tensor, weights: ExpertWeights, num_rows: int) -> str:
    """A key of PLAIN or CUSTOM. The rule is that of `layer.experts.backend_for`, measured there.

    On a CPU the products in C++ or else the lean loop, which keep the least for backward; without gradients, for few
    rows, one call in C++ or else the fewest operators. On a GPU one kernel for all experts, where it can run. A custom
    loop can't be traced, so a graph gets the kernel too.
    """
    compiling, stacks = torch.compiler.is_compiling(), (weights.up_eHD, weights.down_eDF)
    if x_TD.device.type == "cpu" and (plain or not compiling):
        if plain and is_few(num_rows, len(weights.up_eHD)) and not unsupported_plain(x_TD, *stacks, "swiglu"):
            return "native_few"
        if plain and not compiling and not torch.is_grad_enabled() and few_rows(num_rows, weights.up_eHD):
            return "few"
        is_native = plain and why_not_native(x_TD, *stacks, "swiglu") is None
        return "native" if is_native else "lean"
    return "lean" if grouped_mm_supports(x_TD, weights.up_eHD, weights.down_eDF) else "grouped"


def _are_frozen(weights: ExpertWeights) -> bool:
    """In training, but not they: the custom loop then computes no gradient for them, the plain one always does."""
    wanted = weights.up_eHD.requires_grad or weights.down_eDF.requires_grad
    return torch.is_grad_enabled() and not wanted and not torch.compiler.is_compiling()


def _in_compute_dtype(weights: ExpertWeights, device: str) -> ExpertWeights:
    """Under autocast in its dtype: our operators don't see autocast."""
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return weights
    dtype = torch.get_autocast_dtype(device)
    tensors = (weights.up_eHD, weights.down_eDF, weights.up_bias_eH, weights.down_bias_eD)
    up, down, up_bias, down_bias = (None if tensor is None else tensor.to(dtype) for tensor in tensors)
    assert up is not None
    assert down is not None
    return ExpertWeights(up, down, up_bias, down_bias)


def _plan(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> RaggedPlan:
    """Rows by expert. Those of absent experts sort behind all others, where nothing is computed."""
    T, K = ids_TK.shape
    token_ids_N = torch.arange(T, device=ids_TK.device).repeat_interleave(K)
    weights_N = weights_TK.reshape(-1).to(torch.promote_types(weights_TK.dtype, torch.float32))
    expert_ids_N = ids_TK.reshape(-1).long().clamp(max=num_experts)
    return ragged_plan(token_ids_N, expert_ids_N, weights_N, num_experts, top_k=K)


def _by_transformers(experts: nn.Module, missing: str, *arguments: Tensor) -> Tensor:
    """Once per class and reason, by Python's own rule for equal warnings."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    warnings.warn(
        f'experts_implementation="equipoise": {type(experts).__name__} has {missing}, which equipoise does not '
        "compute; transformers' grouped_mm does",
        RuntimeWarning,
        stacklevel=2,
    )
    y_TD: Tensor = grouped_mm_experts_forward(experts, *arguments)
    return y_TD
