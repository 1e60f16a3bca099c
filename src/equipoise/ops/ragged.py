"""Rows sorted by expert: the layout that expert backends compute on.

`ragged_plan` orders the N assignments by expert, dropped ones last. Rows keep their number (static shapes, no host
synchronisation); only the first sum(counts_e) rows are computed. Gathering the rows is left to the backend, so that
it may fuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from equipoise.ops.count import count_assignments

Sort = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]  # as `sort_on_device`

_FEW = 1024  # assignments; with more the sorts themselves take longer than the calls


@dataclass(frozen=True, eq=False)
class RaggedPlan:
    """How token rows become expert rows, and back.

    token_ids_R: int64, the row of x that each expert row reads and adds its result to.
    weights_R: fp32, the combine weight of each row, with its gradient.
    counts_e: int64, rows per expert, in this order. sum(counts_e) <= R; the rows after that are dropped.
    rows_TK: int64 (T, K), the row of each token's k-th assignment, when every token has K assignments; else None.
    may_drop: False promises sum(counts_e) == R.
    drops: see `DispatchPlan`.
    """

    token_ids_R: Tensor
    weights_R: Tensor
    counts_e: Tensor
    rows_TK: Tensor | None
    may_drop: bool = False
    drops: Mapping[str, Tensor] = field(default_factory=dict)


def ragged_plan(
    token_ids_N: Tensor,
    expert_ids_N: Tensor,
    weights_N: Tensor,
    num_experts: int,
    *,
    top_k: int | None = None,
    keep_N: Tensor | None = None,
    drops: Mapping[str, Tensor] | None = None,
    sort: Sort | None = None,
) -> RaggedPlan:
    """Sort assignments by expert (stable: token order within an expert); those with keep_N False go last.

    sort: who sorts, in place of the one that fits the device and the number of assignments.
    """
    keys_N = expert_ids_N if keep_N is None else torch.where(keep_N, expert_ids_N, num_experts)
    order_R, rows_N, counts = (sort or sort_rows)(keys_N, num_experts + 1)
    return RaggedPlan(
        token_ids_R=token_ids_N.index_select(0, order_R),
        weights_R=weights_N.index_select(0, order_R),
        counts_e=counts[:num_experts],
        rows_TK=None if top_k is None else rows_N.view(-1, top_k),
        may_drop=keep_N is not None,
        drops={} if drops is None else drops,
    )


def sort_rows(keys_N: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """`sort_on_device`, or `sort_on_host` where that is faster."""
    on_host = keys_N.device.type == "cpu" and len(keys_N) <= _FEW and not torch.compiler.is_compiling()
    return (sort_on_host if on_host else sort_on_device)(keys_N, num_keys)


def sort_on_device(keys_N: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order_R, rows_N, counts), int64: which assignment is in each row, the row of each assignment, rows by key.

    keys_N: int64 in [0, num_keys). Equal keys keep their order. It never waits for the device.
    """
    order_R = torch.argsort(keys_N, stable=True)
    rows_N = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    return order_R, rows_N, count_assignments(keys_N, num_keys)


def sort_on_host(keys_N: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same by NumPy, for a few keys on a CPU: its calls cost a third of torch's."""
    keys = keys_N.numpy()
    order = np.argsort(keys, kind="stable")
    rows = np.empty_like(order)
    rows[order] = np.arange(len(order))
    return torch.from_numpy(order), torch.from_numpy(rows), torch.from_numpy(np.bincount(keys, minlength=num_keys))


def sum_rows(y_RD: Tensor, token_ids_R: Tensor, rows_TK: Tensor | None, num_tokens: int) -> Tensor:
    """(T, D): add up each token's rows, accumulating in fp32 (fp64 for fp64). Rows to be left out must be zero.

    With rows_TK each token's K rows are read where they lie and summed in one pass; without it they are scattered.
    """
    if y_RD.shape[0] == 0 or num_tokens == 0:
        return y_RD.new_zeros(num_tokens, y_RD.shape[1]) + y_RD.sum()  # 0, but still a function of the rows
    if rows_TK is not None:
        summed: Tensor = torch.nn.functional.embedding_bag(rows_TK, y_RD, mode="sum")
        return summed
    dtype = torch.promote_types(y_RD.dtype, torch.float32)
    total = torch.zeros(num_tokens, y_RD.shape[1], dtype=dtype, device=y_RD.device)
    return total.index_add_(0, token_ids_R, y_RD.to(dtype)).to(y_RD.dtype)
