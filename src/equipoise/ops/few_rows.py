"""Expert matmuls for the few rows of a decode step: each expert's rows filled up to one number, products in batches.

With a handful of rows the arithmetic is nothing: what counts are operators, of which `ops.lean_experts` needs a dozen
per expert, and how fast weights are read, which on a CPU one product of a few rows leaves to one core, and a batch of
them to all. A batch takes weights that lie at even distances, as any two experts' do: nothing is copied. Where there is
only one thread, products one by one are faster, and nothing is filled up.
Plain torch, differentiated by autograd, which keeps several times what the lean backend keeps.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from equipoise.ops.activation import activate, check_activation
from equipoise.ops.lean_experts import lean_experts
from equipoise.ops.ragged import RaggedPlan, sum_rows

_CACHED_BYTES = 2**20  # of pre-activations; with twice as many the lean loop is as fast
_CHEAP = 8  # rows per expert that hardly take longer than one: the weights are what is read


def few_rows(num_rows: int, up_eHD: Tensor) -> bool:
    """Whether so many rows are few for these experts."""
    return num_rows * up_eHD.shape[1] * up_eHD.element_size() <= _CACHED_BYTES


def few_rows_experts(x_TD: Tensor, plan: RaggedPlan, up_eHD: Tensor, down_eDF: Tensor, activation: str) -> Tensor:
    """y_TD: each token's weighted sum over its experts. Same signature and result as `lean_experts`.

    Where one expert has many more rows than the others, it is `lean_experts`. It reads the counts on the host, which
    waits for a GPU.
    """
    counts_e = plan.counts_e.cpu().numpy()
    busy_b = counts_e.nonzero()[0]
    sizes_b = counts_e[busy_b]
    num_rows, most = int(sizes_b.sum()), int(sizes_b.max(initial=0))
    if num_rows and _is_faster_one_by_one(x_TD):
        return _one_by_one(x_TD, plan, up_eHD, down_eDF, activation)
    if most == 0 or most > max(_CHEAP, 2 * num_rows / len(busy_b)):
        return lean_experts(x_TD, plan, up_eHD, down_eDF, activation)
    runs = _runs(busy_b.tolist())
    token_ids_R, weights_R = plan.token_ids_R, plan.weights_R
    num_dropped, places_R = len(token_ids_R) - num_rows, None
    if num_dropped or num_rows < len(busy_b) * most:
        rows_bC, places_R = (torch.from_numpy(each).to(x_TD.device) for each in _filled_up(sizes_b, most))
        token_ids_R, weights_R = token_ids_R[rows_bC], weights_R[rows_bC]
    x_bCD = x_TD.index_select(0, token_ids_R.view(-1)).view(len(busy_b), most, -1)
    weights_bC1 = weights_R.to(x_TD.dtype).view(len(busy_b), most, 1)
    a_bCF = activate(_products(x_bCD, up_eHD, runs), check_activation(activation)) * weights_bC1
    y_RD = _products(a_bCF, down_eDF, runs).flatten(0, 1)
    if places_R is not None:
        y_RD = y_RD.index_select(0, places_R)
    return _summed(y_RD, plan, x_TD.shape[0])


def _is_faster_one_by_one(x_TD: Tensor) -> bool:
    """Low precision is left out: a product is compiled anew for each number of rows."""
    return x_TD.is_cpu and x_TD.dtype in (torch.float32, torch.float64) and torch.get_num_threads() == 1


def _one_by_one(x_TD: Tensor, plan: RaggedPlan, up_eHD: Tensor, down_eDF: Tensor, activation: str) -> Tensor:
    """The same with a product per busy expert; everything else is done for all rows together."""
    sizes = plan.counts_e.tolist()
    num_rows = sum(sizes)
    x_RD, weights_R1 = x_TD.index_select(0, plan.token_ids_R[:num_rows]), plan.weights_R[:num_rows, None]
    z_RH = torch.cat([x_n.mm(up) for x_n, up in _with_rows(x_RD, sizes, up_eHD)])
    a_RF = activate(z_RH, check_activation(activation)) * weights_R1.to(x_TD.dtype)
    y_RD = torch.cat([a_n.mm(down) for a_n, down in _with_rows(a_RF, sizes, down_eDF)])
    return _summed(y_RD, plan, x_TD.shape[0])


def _with_rows(rows_RI: Tensor, sizes: list[int], weight_eOI: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(its rows, its transposed weight) of each expert that has rows."""
    weight_eIO, busy = weight_eOI.mT, [expert for expert, size in enumerate(sizes) if size]
    for rows, expert in zip(torch.split(rows_RI, [sizes[expert] for expert in busy]), busy, strict=True):
        yield rows, weight_eIO[expert]


def _summed(y_RD: Tensor, plan: RaggedPlan, num_tokens: int) -> Tensor:
    """(T, D): each token's sum over the rows that are computed; the plan's last ones, which are not, add nothing."""
    if num_dropped := len(plan.token_ids_R) - len(y_RD):
        y_RD = torch.cat([y_RD, y_RD.new_zeros(num_dropped, y_RD.shape[1])])
    return sum_rows(y_RD, plan.token_ids_R, plan.rows_TK, num_tokens)


def _filled_up(sizes_b: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(the row at each place (b, C), the place of each row (R,)) where each of b experts has room for C = most rows.

    Filled up with an expert's own last row: another's could be NaN. The copies are computed, and not read.
    """
    starts_b = sizes_b.cumsum() - sizes_b
    rows_bC = starts_b[:, None] + np.minimum(np.arange(most), sizes_b[:, None] - 1)
    places_R = np.arange(int(sizes_b.sum())) + np.repeat(np.arange(len(sizes_b)) * most - starts_b, sizes_b)
    return rows_bC, places_R


def _runs(numbers: list[int]) -> list[tuple[slice, slice]]:
    """Ascending numbers as few slices: (where in the list, the numbers themselves) for each."""
    runs = []
    start = 0
    while start < len(numbers):
        end = start + 1
        step = numbers[end] - numbers[start] if end < len(numbers) else 1
        while end < len(numbers) and numbers[end] - numbers[end - 1] == step:
            end += 1
        runs.append((slice(start, end), slice(numbers[start], numbers[end - 1] + 1, step)))
        start = end
    return runs


def _products(rows_bCI: Tensor, weight_eOI: Tensor, runs: list[tuple[slice, slice]]) -> Tensor:
    """(b, C, O): each busy expert's weight times its rows."""
    weight_eIO = weight_eOI.mT
    parts = [torch.bmm(rows_bCI[places], weight_eIO[experts]) for places, experts in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
