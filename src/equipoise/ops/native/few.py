"""The binding of few.cpp: the experts of a few tokens in one call, weights in fp32, bf16, int8 or int4, no gradients.

The twins are `ops.few_rows` for plain weights and `ops.packed` for the others. A token's result has the same bits
alone, in a batch, on any number of threads, and with its experts passed one by one (`rows_of_expert`, `sum_of_rows`).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from equipoise.ops.native.build import load
from equipoise.ops.packed import Full, Int4, Int8, Parts, WeightFormat
from equipoise.ops.ragged import RaggedPlan

NEEDS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_bf16")
_PLAIN = {torch.float32: 0, torch.bfloat16: 1}
INT8, INT4 = 2, 3
_INT4_CHANNELS = 64  # a block of torch's order
_STEP = 32  # inputs and outputs
_MOST_ROWS, _MOST_PER_EXPERT = 512, 8


@dataclass(frozen=True, eq=False)
class Stacked:
    """Weights of e experts, each part contiguous; of one without its dim. kind: 0 fp32, 1 bf16, 2 int8, 3 int4.

    up, down: (e, H, D) and (e, D, F), or (e, H, D / 2) and (e, D, F / 2) in int4. up_scales, down_scales: bf16, (e, H)
    and (e, D) in int8, (e, D / group, H, 2) and (e, F / group, D, 2) in int4, none in the others.
    """

    kind: int
    up: Tensor
    down: Tensor
    up_scales: Tensor | None = None
    down_scales: Tensor | None = None
    group: int = 1


def is_few(num_rows: int, num_experts: int) -> bool:
    """Whether so many rows are few for so many experts: more per expert are faster in products of many rows.

    Never where a backward pass may come, or a graph is traced.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return num_rows <= min(_MOST_ROWS, _MOST_PER_EXPERT * num_experts)


@cache
def _library() -> ctypes.CDLL | None:
    library = load("few.cpp", NEEDS).library
    if library is not None:
        i, n, p = ctypes.c_int, ctypes.c_long, ctypes.c_void_p
        library.equipoise_few.argtypes = (i, i, n, i, n, n, n, n, *(10 * (p,)))
        library.equipoise_few_sums.argtypes = (i, n, n, n, p, p, p)
        library.equipoise_few.restype = library.equipoise_few_sums.restype = None
    return library


@cache
def unsupported(kind: int, dim: int, hidden_dim: int, activation: str) -> str:
    """Why such experts can't be computed here; "" if they can. The first question compiles."""
    if activation != "swiglu":
        return f"no native code for {activation}"
    step = _INT4_CHANNELS if kind == INT4 else _STEP
    if dim % step or hidden_dim % step:
        return f"the native code takes sizes in multiples of {step}, got D = {dim}, F = {hidden_dim}"
    if kind == INT4 and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "torch orders int4 for another processor"
    return load("few.cpp", NEEDS).reason if _library() is None else ""


def unsupported_plain(x_TD: Tensor, up_eHD: Tensor, down_eDF: Tensor, activation: str) -> str:
    """The same for weights as `layer.Experts` has them."""
    if x_TD.device.type != "cpu" or up_eHD.device.type != "cpu":
        return f"native code is for the CPU, got {x_TD.device}"
    kind = _PLAIN.get(up_eHD.dtype)
    if kind is None or x_TD.dtype != up_eHD.dtype:
        return f"no native code for {x_TD.dtype} with weights in {up_eHD.dtype}"
    if not (up_eHD.is_contiguous() and down_eDF.is_contiguous()):
        return "the native code takes contiguous weights"
    return unsupported(kind, down_eDF.shape[1], down_eDF.shape[2], activation)


def unsupported_format(format: WeightFormat, dim: int, hidden_dim: int, activation: str) -> str:
    """The same for weights in a format."""
    kind = _kind_of(format)
    return (
        f"no native code for {format.name} in {format.dtype}"
        if kind is None
        else unsupported(kind, dim, hidden_dim, activation)
    )


def stacked_of(format: WeightFormat, up: Parts, down: Parts) -> Stacked:
    """What the format made of several experts, stacked, or of one."""
    kind = _kind_of(format)
    assert kind is not None
    if len(up) == 1:
        return Stacked(kind, up[0], down[0])
    return Stacked(kind, up[0], down[0], up[1], down[1], format.group if isinstance(format, Int4) else 1)


def _kind_of(format: WeightFormat) -> int | None:
    if isinstance(format, Full):
        return _PLAIN.get(format.dtype)
    if format.dtype != torch.bfloat16:
        return None
    return INT4 if isinstance(format, Int4) else INT8 if isinstance(format, Int8) else None


def few_experts(x_TD: Tensor, plan: RaggedPlan, weights: Stacked) -> Tensor:
    """y_TD in x's dtype, fp32 or bf16: each token's weighted sum over its experts. Sizes are those of `unsupported`."""
    x_TD = x_TD.contiguous()
    y_TD = torch.empty_like(x_TD)
    _call(x_TD, plan.token_ids_R, plan.weights_R, plan.counts_e, weights, None, y_TD)
    return y_TD


def rows_of_expert(x_TD: Tensor, token_ids_n: Tensor, weights_n: Tensor, weights: Stacked, out_nD: Tensor) -> None:
    """Write one expert's weighted outputs, fp32, for the n rows it has; `weights` has that expert alone."""
    _call(x_TD.contiguous(), token_ids_n, weights_n, torch.tensor([len(token_ids_n)]), weights, out_nD, None)


def sum_of_rows(y_RD: Tensor, token_ids_R: Tensor, like_TD: Tensor) -> Tensor:
    """y_TD in the shape and dtype of like_TD from fp32 rows in the order of a plan, without those that were dropped."""
    library, y_TD = _library(), torch.empty_like(like_TD, memory_format=torch.contiguous_format)
    assert library is not None
    wide, (T, D) = like_TD.dtype == torch.float32, y_TD.shape
    ids_R = token_ids_R.contiguous()
    library.equipoise_few_sums(wide, T, D, len(y_RD), ids_R.data_ptr(), y_RD.data_ptr(), y_TD.data_ptr())
    return y_TD


def few_native_experts(x_TD: Tensor, plan: RaggedPlan, up_eHD: Tensor, down_eDF: Tensor, activation: str) -> Tensor:
    """y_TD, as `ops.few_rows.few_rows_experts`, without gradients. Raises ValueError for what it does not take."""
    if reason := unsupported_plain(x_TD, up_eHD, down_eDF, activation):
        raise ValueError(f'native experts: {reason}; use backend="few"')
    return few_experts(x_TD, plan, Stacked(_PLAIN[up_eHD.dtype], up_eHD, down_eDF))


def _call(
    x_TD: Tensor,
    token_ids_R: Tensor,
    weights_R: Tensor,
    counts_e: Tensor,
    weights: Stacked,
    y_RD: Tensor | None,
    y_TD: Tensor | None,
) -> None:
    """Straight, without a list of tensors: for a small layer every microsecond here counts."""
    library = _library()
    assert library is not None
    up_scales, down_scales = weights.up_scales, weights.down_scales
    token_ids_R, weights_R, counts_e = token_ids_R.contiguous(), weights_R.float().contiguous(), counts_e.contiguous()
    T, D = x_TD.shape
    library.equipoise_few(
        weights.kind,
        x_TD.dtype == torch.float32,
        weights.group,
        torch.get_num_threads(),
        T,
        D,
        weights.down.shape[-1] * (2 if weights.kind == INT4 else 1),
        counts_e.shape[0],
        x_TD.data_ptr(),
        token_ids_R.data_ptr(),
        weights_R.data_ptr(),
        counts_e.data_ptr(),
        weights.up.data_ptr(),
        None if up_scales is None else up_scales.data_ptr(),
        weights.down.data_ptr(),
        None if down_scales is None else down_scales.data_ptr(),
        None if y_RD is None else y_RD.data_ptr(),
        None if y_TD is None else y_TD.data_ptr(),
    )
