"""The lean experts in C++ (`lean.cpp`): forward and backward in bf16 on a CPU with the instructions of avx512_bf16.

What is kept for backward, and the signature, are those of `ops.lean_experts`, its twin and its fallback: the operators
below are the lean ones wherever `why_not_native` has a reason. All sums of products are in fp32 in one fixed order, so
results have the same bits on each run, with any number of threads, and whatever else is in the batch.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from equipoise.ops.fresh import fresh
from equipoise.ops.lean_experts import Operators, experts_by, fake_backward, fake_forward, lean_backward, lean_forward
from equipoise.ops.native.build import cpu_features, load
from equipoise.ops.ragged import RaggedPlan, sum_rows

SOURCE = "lean.cpp"
NEEDS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
MULTIPLE = 32  # that D and F must be of
_ALIGNMENT = 64  # bytes, of the memory to work in


def why_not_native(x_TD: Tensor, up_eHD: Tensor, down_eDF: Tensor, activation: str) -> str | None:
    """Why the lean experts in torch are taken for these tensors, or None where those in C++ can be.

    It compiles them when everything else speaks for them: about a second, once for each machine. While a graph is
    traced only the tensors are asked about; the operators ask for the rest when they run.
    """
    reason = _unfit(x_TD, up_eHD, down_eDF, activation)
    return reason if reason or torch.compiler.is_compiling() else _missing()


def _unfit(x_TD: Tensor, up_eHD: Tensor, down_eDF: Tensor, activation: str) -> str | None:
    if x_TD.device.type != "cpu":
        return f"native is for CPUs, x is on {x_TD.device.type}"
    if not x_TD.dtype == up_eHD.dtype == down_eDF.dtype == torch.bfloat16:
        return f"native computes in torch.bfloat16, not in {x_TD.dtype}"
    if activation != "swiglu":
        return f"native computes swiglu, not {activation}"
    for name, size in (("dim", down_eDF.shape[1]), ("hidden_dim", down_eDF.shape[2])):
        if size % MULTIPLE or not size:
            return f"native takes whole {MULTIPLE}s, {name} = {size} is not"
    return None


def _missing() -> str | None:
    if "amx_bf16" in cpu_features():
        return "this CPU has amx_bf16, which torch's own products use"
    built = load(SOURCE, NEEDS)
    return built.reason if built.library is None else None


def _is_native(x_TD: Tensor, up_eHD: Tensor, down_eDF: Tensor, activation: str) -> bool:
    return _unfit(x_TD, up_eHD, down_eDF, activation) is None and _missing() is None


@torch.library.custom_op("equipoise::native_forward", mutates_args=())
def native_forward(
    x_TD: Tensor,
    weights_R: Tensor,
    up_eHD: Tensor,
    down_eDF: Tensor,
    token_ids_R: Tensor,
    rows_TK: Tensor | None,
    counts_e: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """As `lean_forward`."""
    if not _is_native(x_TD, up_eHD, down_eDF, activation):
        args = (x_TD, weights_R, up_eHD, down_eDF, token_ids_R, rows_TK, counts_e, activation)
        by_torch: tuple[Tensor, Tensor] = lean_forward(*args, save)
        return by_torch
    num_rows, (num_experts, D, F) = len(token_ids_R), down_eDF.shape
    num_computed = int(counts_e.sum())
    z_RH = fresh((num_rows if save else 0, 2 * F), x_TD)
    y_RD = fresh((num_rows, D), x_TD)
    y_RD[num_computed:].zero_()  # dropped rows
    reads, writes = [x_TD, weights_R.float(), up_eHD, down_eDF, token_ids_R], [z_RH if save else None, y_RD]
    _call("lean_forward", reads, counts_e, (num_experts, D, F), writes, backward=False)
    return sum_rows(y_RD, token_ids_R, rows_TK, x_TD.shape[0]), z_RH


native_forward.register_fake(fake_forward)


@torch.library.custom_op("equipoise::native_backward", mutates_args=())
def native_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    z_RH: Tensor,
    weights_R: Tensor,
    up_eHD: Tensor,
    down_eDF: Tensor,
    token_ids_R: Tensor,
    rows_TK: Tensor | None,
    counts_e: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `lean_backward`."""
    if not _is_native(x_TD, up_eHD, down_eDF, activation):
        args = (grad_TD, x_TD, z_RH, weights_R, up_eHD, down_eDF, token_ids_R, rows_TK, counts_e, activation)
        by_torch: tuple[Tensor, Tensor, Tensor, Tensor] = lean_backward(*args)
        return by_torch
    num_rows, (num_experts, D, F) = len(token_ids_R), down_eDF.shape
    num_computed = int(counts_e.sum())
    grad_x_RD = fresh((num_rows, D), x_TD)
    grad_x_RD[num_computed:].zero_()
    grad_weights_R = torch.zeros(num_rows)
    grad_up, grad_down = fresh(up_eHD.shape, up_eHD), fresh(down_eDF.shape, down_eDF)
    reads = [grad_TD, x_TD, z_RH, weights_R.float(), up_eHD, down_eDF, token_ids_R]
    writes: list[Tensor | None] = [grad_x_RD, grad_weights_R, grad_up, grad_down]
    _call("lean_backward", reads, counts_e, (num_experts, D, F), writes, backward=True)
    summed_TD = sum_rows(grad_x_RD, token_ids_R, rows_TK, x_TD.shape[0])
    return summed_TD, grad_weights_R.to(weights_R.dtype), grad_up, grad_down


native_backward.register_fake(fake_backward)


def _call(
    function: str,
    reads: list[Tensor],
    counts_e: Tensor,
    sizes: tuple[int, int, int],
    writes: list[Tensor | None],
    backward: bool,
) -> None:
    """Call a function of the library with threads and memory to work in. sizes: E, D, F."""
    library = load(SOURCE, NEEDS).library
    assert library is not None  # `_is_native` asked
    counts_e, reads = counts_e.contiguous(), [tensor.contiguous() for tensor in reads]
    numbers = [ctypes.c_int64(number) for number in (*sizes, torch.get_num_threads())]
    library.lean_scratch_bytes.restype = ctypes.c_int64
    num_bytes = library.lean_scratch_bytes(_pointer(counts_e), *numbers, ctypes.c_int64(backward))
    memory = fresh((num_bytes + _ALIGNMENT,), torch.empty(0, dtype=torch.uint8))
    memory = memory[-memory.data_ptr() % _ALIGNMENT :]
    run = getattr(library, function)
    run.restype = None
    run(*map(_pointer, reads), _pointer(counts_e), *numbers, *map(_pointer, writes), _pointer(memory))


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def native_experts(x_TD: Tensor, plan: RaggedPlan, up_eHD: Tensor, down_eDF: Tensor, activation: str) -> Tensor:
    """y_TD: each token's weighted sum over its experts. Same signature and result as `lean_experts`."""
    return experts_by(Operators(native_forward, native_backward), x_TD, plan, up_eHD, down_eDF, activation)
