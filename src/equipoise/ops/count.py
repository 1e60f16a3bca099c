"""Counting that stays exact when a forward runs twice.

Activation checkpointing runs a layer's forward again inside the backward pass. Whatever adds up numbers in a forward
would then count each token twice. The operators here look whether they are called from within a backward pass and do
nothing there, so that each token is counted once per real forward. They are opaque to `torch.compile` (no graph
break), never synchronise with the host, and write into buffers that the caller owns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inside_backward() -> bool:
    """True while autograd runs a backward pass on this thread: a forward seen now is a recomputation.

    `torch.utils.checkpoint` asks the same question in the same way (torch:torch/utils/checkpoint.py).
    """
    return bool(torch._C._current_graph_task_id() != -1)


def count_assignments(expert_ids_N: Tensor, num_experts: int) -> Tensor:
    """int64 (E,): assignments per expert. Unlike `torch.bincount` it never synchronises a GPU with the host.

    expert_ids_N: int64 in [0, E).
    """
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_ids_N.device)
    return counts_E.scatter_add_(0, expert_ids_N, torch.ones_like(expert_ids_N))


@torch.library.custom_op("equipoise::accumulate_counts", mutates_args=("counts_E",))
def accumulate_counts(counts_E: Tensor, expert_ids_N: Tensor) -> None:
    """Add the assignments per expert to counts_E (int64), in place; does nothing in a recomputed forward."""
    if not inside_backward():
        counts_E.add_(count_assignments(expert_ids_N, counts_E.shape[0]))


@accumulate_counts.register_fake
def _(counts_E: Tensor, expert_ids_N: Tensor) -> None:
    return None


@torch.library.custom_op("equipoise::accumulate", mutates_args=("total",))
def accumulate(total: Tensor, addend: Tensor) -> None:
    """Add addend to total in place (same shape; converted to total's dtype); nothing in a recomputed forward."""
    if not inside_backward():
        total.add_(addend)


@accumulate.register_fake
def _(total: Tensor, addend: Tensor) -> None:
    return None


@torch.library.custom_op("equipoise::accumulate_pairs", mutates_args=("counts_EE",))
def accumulate_pairs(counts_EE: Tensor, ids_TK: Tensor) -> None:
    """Add, for each pair of experts, the tokens that chose both, to counts_EE (int64 (E, E), contiguous), in place.

    ids_TK: int64, distinct within a row. The diagonal counts tokens by expert. Nothing in a recomputed forward.
    """
    if not inside_backward():
        pairs = (ids_TK[:, :, None] * counts_EE.shape[0] + ids_TK[:, None, :]).reshape(-1)
        counts_EE.view(-1).scatter_add_(0, pairs, torch.ones_like(pairs))


@accumulate_pairs.register_fake
def _(counts_EE: Tensor, ids_TK: Tensor) -> None:
    return None


@torch.library.custom_op("equipoise::accumulate_ragged_pairs", mutates_args=("counts_EE",))
def accumulate_ragged_pairs(
    counts_EE: Tensor, token_ids_N: Tensor, expert_ids_N: Tensor, num_tokens: int, stride: int
) -> None:
    """The same for tokens with different numbers of experts, in any order, of every stride-th token: A^T A.

    token_ids_N: int64 in [0, num_tokens). A is float64, tokens by experts: exact, and no autocast rounds it.
    """
    if not inside_backward():
        rows = -(-num_tokens // stride)
        row_N = torch.where(token_ids_N % stride == 0, token_ids_N // stride, rows)  # the last row is thrown away
        chosen = torch.zeros(rows + 1, counts_EE.shape[0], dtype=torch.float64, device=counts_EE.device)
        chosen.index_put_((row_N, expert_ids_N), chosen.new_ones(()))
        counts_EE.add_((chosen[:rows].T @ chosen[:rows]).long())


@accumulate_ragged_pairs.register_fake
def _(counts_EE: Tensor, token_ids_N: Tensor, expert_ids_N: Tensor, num_tokens: int, stride: int) -> None:
    return None
