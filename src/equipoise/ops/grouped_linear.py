"""A linear projection with a weight of its own for each expert's rows, differentiated by autograd.

On a CPU one product per expert that has rows; on a GPU one grouped product where the kernel takes the sizes. It keeps
the gathered rows for backward. In a graph of `torch.compile` the products per expert, whose sizes are known only when
they run, are one operator. The slow twin is a loop over rows, in tests/ops/test_grouped_linear.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.ops.grouped_experts import grouped_mm, grouped_mm_supports
from equipoise.ops.ragged import sort_rows


@dataclass(frozen=True, eq=False)
class Grouping:
    """Assignments sorted by expert.

    order_R: int64, the assignment that each row is. rows_N: int64, the row of each assignment. counts_e: int64, rows
    per expert, in this order.
    """

    order_R: Tensor
    rows_N: Tensor
    counts_e: Tensor

    @staticmethod
    def of(expert_ids_N: Tensor, num_experts: int) -> Grouping:
        """Stable: assignments of an expert keep their order."""
        return Grouping(*sort_rows(expert_ids_N, num_experts))


def grouped_linear(x_MD: Tensor, source_R: Tensor, counts_e: Tensor, weight_eHD: Tensor) -> Tensor:
    """(R, H): row r is x[source_r] W[e]^T with the weight of the expert that the row belongs to.

    x_MD: any number of rows. source_R: int64 in [0, M), sorted by expert. counts_e: int64, their sum is R.
    weight_eHD: one matrix per expert.
    Runs in autocast's dtype where autocast is on.
    """
    device = x_MD.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_MD, weight_eHD = x_MD.to(dtype), weight_eHD.to(dtype)
    x_RD = x_MD.index_select(0, source_R)
    if device == "cuda" and grouped_mm_supports(x_RD, weight_eHD, weight_eHD.transpose(1, 2)) is None:
        y_RH: Tensor = grouped_mm(x_RD, weight_eHD, counts_e.cumsum(0).to(torch.int32))
        return y_RH
    if torch.compiler.is_compiling():
        z_RH: Tensor = products(x_RD, weight_eHD, counts_e)
        return z_RH
    return _each(x_RD, weight_eHD, counts_e)


def _each(x_RD: Tensor, weight_eHD: Tensor, counts_e: Tensor) -> Tensor:
    weights = weight_eHD.unbind()  # one stack in backward; indexing would fill a whole gradient per expert
    parts = zip(torch.split(x_RD, counts_e.tolist()), weights, strict=True)
    found = [rows @ weight_HD.t() for rows, weight_HD in parts if len(rows)]
    return torch.cat(found) if found else x_RD @ weights[0].t()


@torch.library.custom_op("equipoise::products_by_expert", mutates_args=())
def products(x_RD: Tensor, weight_eHD: Tensor, counts_e: Tensor) -> Tensor:
    """(R, H): x W[e]^T for the rows of each expert. counts_e: int64, their sum is R."""
    return _each(x_RD, weight_eHD, counts_e)


@products.register_fake
def _(x_RD: Tensor, weight_eHD: Tensor, counts_e: Tensor) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], weight_eHD.shape[1])


@torch.library.custom_op("equipoise::products_by_expert_backward", mutates_args=())
def products_backward(grad_RH: Tensor, x_RD: Tensor, weight_eHD: Tensor, counts_e: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; 0 for an expert without rows."""
    counts = counts_e.tolist()
    grad_x, grad_weight = torch.empty_like(x_RD), weight_eHD.new_empty(weight_eHD.shape)
    parts = zip(*(torch.split(each, counts) for each in (grad_RH, x_RD, grad_x)), strict=True)
    for expert, (grad_nH, x_nD, grad_x_nD) in enumerate(parts):
        torch.mm(grad_nH.t(), x_nD, out=grad_weight[expert])
        torch.mm(grad_nH, weight_eHD[expert], out=grad_x_nD)
    return grad_x, grad_weight


@products_backward.register_fake
def _(grad_RH: Tensor, x_RD: Tensor, weight_eHD: Tensor, counts_e: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_RD), weight_eHD.new_empty(weight_eHD.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, Tensor, None]:
    return *products_backward(grad_RH, *ctx.saved_tensors), None


products.register_autograd(_backward, setup_context=_save)
