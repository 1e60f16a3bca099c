"""The experts' products one expert at a time, with observers around each, to time single experts.

The slow twin of the lean backend in its order of work; in fp32 its forward has the same bits on a CPU. Only used while
there are probes. On a GPU it waits for the number of rows of each expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as fn
from torch import Tensor

from equipoise.ops.activation import activate, check_activation
from equipoise.ops.ragged import RaggedPlan, sum_rows


class ExpertProbe(Protocol):
    """Is told when an expert's computation begins and ends. Between the two only that expert is computed."""

    def begin(self, expert: int, num_rows: int) -> None:
        """Before the products of one expert that has rows."""
        ...

    def end(self, expert: int) -> None:
        """After them."""
        ...


def probed_experts(
    x_TD: Tensor,
    plan: RaggedPlan,
    up_eHD: Tensor,
    down_eDF: Tensor,
    activation: str,
    probes: Sequence[ExpertProbe] = (),
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y (T, D), differentiable. Probes begin in their order and end in the reverse. biases: (e, H) and (e, D)."""
    kind, start, parts = check_activation(activation), 0, []
    ups, downs = up_eHD.unbind(), down_eDF.unbind()  # one gradient for all: indexing would make a whole one for each
    up_biases, down_biases = ((), ()) if biases is None else (each.unbind() for each in biases)
    for expert, count in enumerate(plan.counts_e.tolist()):
        if not count:
            continue
        rows = slice(start, start + count)
        for probe in probes:
            probe.begin(expert, count)
        x_n = x_TD.index_select(0, plan.token_ids_R[rows])
        weights_n1 = plan.weights_R[rows].to(x_TD.dtype)[:, None]
        if biases is None:
            parts.append((activate(x_n @ ups[expert].t(), kind) * weights_n1) @ downs[expert].t())
        else:
            a_n = activate(fn.linear(x_n, ups[expert], up_biases[expert]), kind)
            parts.append(fn.linear(a_n, downs[expert], down_biases[expert]) * weights_n1)
        for probe in reversed(probes):
            probe.end(expert)
        start += count
    dropped = x_TD.new_zeros(len(plan.token_ids_R) - start, x_TD.shape[1])
    y_TD = sum_rows(torch.cat([*parts, dropped]), plan.token_ids_R, plan.rows_TK, x_TD.shape[0])
    if not parts:  # zero gradients, not None. Of empty parts: 0 times a weight that is not finite is not 0
        inputs = (x_TD, plan.weights_R, up_eHD, down_eDF, *(biases or ()))
        y_TD = y_TD + sum(each[:0].sum().to(y_TD.dtype) for each in inputs)
    return y_TD
