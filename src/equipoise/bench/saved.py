"""Bytes that a forward keeps for its backward.

Counts what autograd holds, each storage once and parameters not at all. It doesn't see temporaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

MIB = 2**20


def saved_for_backward(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes of storage that the graph of forward() keeps alive, beyond the parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # held until the end: a freed storage's address could be taken by another
    del result
    return sum(kept.values())


def lean_formula(num_tokens: int, dim: int, hidden_dim: int, top_k: int, itemsize: int) -> int:
    """Bytes for x and the pre-activation: 2 T D + 4 T K F in bf16, with SwiGLU."""
    return itemsize * (num_tokens * dim + 2 * num_tokens * top_k * hidden_dim)
