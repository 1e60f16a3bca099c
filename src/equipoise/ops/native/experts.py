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
from equipoise.ops.lean_experts import Operators, experts_by, lean_backward, lean_forward
from equipoise.ops.native.build import cpu_features, load
from equipoise.ops.ragged import RaggedPlan, sum_rows

SOURCE = "lean.cpp"
NEEDS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
MULTIPLE = 32  # that D and F must be of


def why_not_native(x_TD: Tensor, up_eHD: Tensor, down_eDF: Tensor, activation: str) -> str | None:
    """Why the lean experts in torch are taken for these tensors, or None where those in C++ can be.

    It compiles them when everything else speaks for them: about a second, once for each machine.
    """
    return _unfit(x_TD, up_eHD, down_eDF, activation) or (
        None if load(SOURCE, NEEDS).library else load(SOURCE, NEEDS).reason
    )


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
    if "amx_bf16" in cpu_features():
        return "this CPU has amx_bf16, which torch's own products use"
    return None


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
    library = load(SOURCE, NEEDS).library
    if library is None or _unfit(x_TD, up_eHD, down_eDF, activation):
        args = (x_TD, weights_R, up_eHD, down_eDF, token_ids_R, rows_TK, counts_e, activation)
        return lean_forward(*args, save)
    num_rows, (num_experts, D, F) = len(token_ids_R), down_eDF.shape
    num_computed = int(counts_e[:num_experts].sum())
    z_RH = fresh((num_rows if save else 0, 2 * F), x_TD)
    y_RD = fresh((num_rows, D), x_TD)
    y_RD[num_computed:].zero_()  # dropped rows
    if num_computed:
        call = _Call(library, counts_e, (num_experts, D, F))
        call(
            library.lean_forward,
            [x_TD, weights_R.float(), up_eHD, down_eDF, token_ids_R],
            [z_RH if save else None, y_RD],
            backward=False,
        )
    return sum_rows(y_RD, token_ids_R, rows_TK, x_TD.shape[0]), z_RH


@native_forward.register_fake
def _(
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
    return torch.empty_like(x_TD), x_TD.new_empty(token_ids_R.shape[0] if save else 0, up_eHD.shape[1])


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
    library = load(SOURCE, NEEDS).library
    if library is None or _unfit(x_TD, up_eHD, down_eDF, activation):
        args = (grad_TD, x_TD, z_RH, weights_R, up_eHD, down_eDF, token_ids_R, rows_TK, counts_e, activation)
        return lean_backward(*args)
    num_rows, (num_experts, D, F) = len(token_ids_R), down_eDF.shape
    num_computed = int(counts_e[:num_experts].sum())
    grad_x_RD = fresh((num_rows, D), x_TD)
    grad_x_RD[num_computed:].zero_()
    grad_weights_R = torch.zeros(num_rows)
    grad_up, grad_down = fresh(up_eHD.shape, up_eHD), fresh(down_eDF.shape, down_eDF)
    call = _Call(library, counts_e, (num_experts, D, F))
    call(
        library.lean_backward,
        [grad_TD, x_TD, z_RH, weights_R.float(), up_eHD, down_eDF, token_ids_R],
        [grad_x_RD, grad_weights_R, grad_up, grad_down],
        backward=True,
    )
    grad_TD_of_x = sum_rows(grad_x_RD, token_ids_R, rows_TK, x_TD.shape[0])
    return grad_TD_of_x, grad_weights_R.to(weights_R.dtype), grad_up, grad_down


@native_backward.register_fake
def _(
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
    return (
        torch.empty_like(x_TD),
        torch.empty_like(weights_R),
        torch.empty_like(up_eHD),
        torch.empty_like(down_eDF),
    )


class _Call:
    """Calls C with what all calls take: counts, sizes, threads, memory to work in."""

    def __init__(self, library: ctypes.CDLL, counts_e: Tensor, sizes: tuple[int, int, int]) -> None:
        self._counts_e = counts_e.contiguous()
        # get_num_threads also makes torch set the number of OpenMP threads for this thread of Python
        self._sizes = [ctypes.c_int64(size) for size in (*sizes, torch.get_num_threads())]
        self._scratch_bytes = library.lean_scratch_bytes
        self._scratch_bytes.restype = ctypes.c_int64

    def __call__(
        self, function: ctypes._NamedFuncPointer, reads: list[Tensor], writes: list[Tensor | None], backward: bool
    ) -> None:
        counts = _pointer(self._counts_e)
        num_bytes = self._scratch_bytes(counts, *self._sizes, ctypes.c_int64(backward))
        memory = fresh((num_bytes + 64,), torch.empty(0, dtype=torch.uint8))
        memory = memory[-memory.data_ptr() % 64 :]
        reads = [tensor.contiguous() for tensor in reads]
        function.restype = None
        function(*map(_pointer, reads), counts, *self._sizes, *map(_pointer, writes), _pointer(memory))


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def native_experts(x_TD: Tensor, plan: RaggedPlan, up_eHD: Tensor, down_eDF: Tensor, activation: str) -> Tensor:
    """y_TD: each token's weighted sum over its experts. Same signature and result as `lean_experts`."""
    return experts_by(Operators(native_forward, native_backward), x_TD, plan, up_eHD, down_eDF, activation)
