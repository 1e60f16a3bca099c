"""The expert matmuls: derivatives by finite differences, edge cases, operator schemas, memory kept for backward."""

import pytest
import torch

from equipoise.layer.experts import reference_experts
from equipoise.ops import few_rows
from equipoise.ops.activation import pre_activation_dim
from equipoise.ops.few_rows import few_rows_experts
from equipoise.ops.grouped_experts import grouped_experts, grouped_mm, grouped_mm_backward
from equipoise.ops.lean_experts import lean_backward, lean_experts, lean_forward
from equipoise.ops.ragged import RaggedPlan, ragged_plan

TOKENS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
EXPERTS = torch.tensor([0, 2, 2, 0, 0, 2, 2, 4])  # experts 1 and 3 have no rows
DROPPED = torch.tensor([True, True, False, True, True, False, True, True])  # tokens 1 and 2 lose one expert
ACTIVATIONS = pytest.mark.parametrize("activation", ["swiglu", "gelu"])


def tensors(activation: str, dtype=torch.float64, D: int = 3, F: int = 2) -> tuple[torch.Tensor, ...]:
    """x, weights, up and down for 4 tokens, 8 assignments, 5 experts; all require gradients."""
    shapes = ((4, D), (8,), (5, pre_activation_dim(F, activation), D), (5, D, F))
    return tuple(torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes)


def plan_of(weights: torch.Tensor, top_k: int | None, keep: torch.Tensor | None) -> RaggedPlan:
    return ragged_plan(TOKENS, EXPERTS, weights, 5, top_k=top_k, keep_N=keep)


@ACTIVATIONS
@pytest.mark.parametrize("keep", [None, DROPPED], ids=["all", "dropped"])
@pytest.mark.parametrize("top_k", [2, None], ids=["rows_TK", "scattered"])
def test_gradcheck_of_lean_experts(activation, keep, top_k):
    def run(x, weights, up, down):
        return lean_experts(x, plan_of(weights, top_k, keep), up, down, activation)

    assert torch.autograd.gradcheck(run, tensors(activation))


@ACTIVATIONS
@pytest.mark.parametrize("keep", [None, DROPPED], ids=["all", "dropped"])
@pytest.mark.parametrize("top_k", [2, None], ids=["rows_TK", "scattered"])
@pytest.mark.parametrize("backend", [lean_experts, few_rows_experts, few_rows._one_by_one, grouped_experts])
def test_backends_equal_the_reference_loop_on_one_plan(backend, activation, keep, top_k):
    args = tensors(activation, torch.float32, D=8, F=4)
    cotangent, results = torch.randn(4, 8), []
    for run in (reference_experts, backend):
        y = run(args[0], plan_of(args[1], top_k, keep), args[2], args[3], activation)
        results.append((y.detach(), *torch.autograd.grad(y, args, cotangent)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [lean_experts, few_rows_experts, grouped_experts, reference_experts])
def test_nothing_to_do_gives_zeros_and_zero_gradients(backend):
    x, weights, up, down = tensors("swiglu", torch.float32, D=8, F=4)
    plan = ragged_plan(TOKENS, EXPERTS, weights, 5, top_k=2, keep_N=torch.zeros(8, dtype=torch.bool))
    y = backend(x, plan, up, down, "swiglu")
    assert not y.any()
    for grad in torch.autograd.grad(y.sum(), (x, weights, up, down)):
        assert not grad.any()  # zeros, not None and not what was left in memory


@ACTIVATIONS
def test_lean_experts_without_gradients_keeps_nothing_and_gives_the_same(activation):
    args = tensors(activation)
    plan = plan_of(args[1], 2, None)
    with torch.no_grad():
        without = lean_experts(args[0], plan, args[2], args[3], activation)
    assert not without.requires_grad
    assert torch.equal(without, lean_experts(args[0], plan, args[2], args[3], activation).detach())


def test_opcheck_of_the_operators():
    x, weights, up, down = (t.detach() for t in tensors("swiglu", torch.float32, D=8, F=4))
    plan = plan_of(weights, 2, DROPPED)
    indices = (plan.token_ids_R, plan.rows_TK, plan.counts_e)
    ends = plan.counts_e.cumsum(0).int()
    rows = x[plan.token_ids_R]
    z = rows.new_zeros(8, 8)  # rows past the last expert's are never written: compare runs on defined numbers
    torch.library.opcheck(lean_forward, (x, plan.weights_R, up, down, *indices, "swiglu", False))
    torch.library.opcheck(lean_backward, (x, x, z, plan.weights_R, up, down, *indices, "swiglu"))
    torch.library.opcheck(grouped_mm, (rows.requires_grad_(), up.requires_grad_(), ends))
    torch.library.opcheck(grouped_mm_backward, (z, rows.detach(), up.detach(), ends))


@pytest.mark.parametrize(
    ("dtype", "D", "F", "reason"),
    [
        (torch.float64, 8, 8, r"grouped_mm has no torch.float64 kernel; use backend=\"lean\""),
        (torch.float32, 6, 8, r"strides of whole 16 bytes, dim = 6 in torch.float32 is not; use backend=\"lean\""),
        (torch.bfloat16, 8, 4, r"strides of whole 16 bytes, hidden_dim = 4 in torch.bfloat16 is not"),
    ],
)
def test_grouped_says_what_it_does_not_take(dtype, D, F, reason):
    x, weights, up, down = tensors("swiglu", dtype, D, F)
    with pytest.raises(ValueError, match=reason):
        grouped_experts(x, plan_of(weights, 2, None), up, down, "swiglu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_kept_for_backward_is_x_and_z_and_indices(dtype):
    T, K, E, D, F = 16, 2, 4, 8, 24
    x = torch.randn(T, D, dtype=dtype, requires_grad=True)
    up = torch.randn(E, 2 * F, D, dtype=dtype, requires_grad=True)
    down = torch.randn(E, D, F, dtype=dtype, requires_grad=True)
    ids = torch.rand(T, E).topk(K).indices
    tokens = torch.arange(T).repeat_interleave(K)
    plan = ragged_plan(tokens, ids.reshape(-1), torch.rand(T * K, requires_grad=True), E, top_k=K)

    saved: dict[int, int] = {}  # storage -> bytes: what is saved twice is there once

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lean_experts(x, plan, up, down, "swiglu")
    for parameter in (up, down):
        del saved[parameter.untyped_storage().data_ptr()]
    x_bytes, z_bytes = T * D * dtype.itemsize, T * K * 2 * F * dtype.itemsize
    if dtype == torch.bfloat16:
        assert (x_bytes, z_bytes) == (2 * T * D, 4 * T * K * F)
    weights, token_ids, rows = 4 * T * K, 8 * T * K, 8 * T * K
    counts = 8 * (E + 1)  # the plan counts the dropped ones behind the last expert
    assert sum(saved.values()) == x_bytes + z_bytes + weights + token_ids + rows + counts
