"""The Triton kernels against the reference loop and by-hand numbers: interpreted on a CPU, or compiled on a GPU.

Not collected by itself: test_kernels.py runs it with TRITON_INTERPRET=1 set before triton is imported, and, on a
GPU, without.
"""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.layer import Capacity, MoE
from equipoise.layer.experts import Experts, reference_experts
from equipoise.ops import ragged
from equipoise.ops.activation import pre_activation_dim
from equipoise.ops.lean_experts import lean_experts
from equipoise.ops.ragged import RaggedPlan, ragged_plan
from equipoise.ops.triton import launch
from equipoise.ops.triton.blocks import cut_for
from equipoise.ops.triton.experts import triton_backward, triton_experts, triton_forward
from equipoise.ops.triton.kernels.products import INTERPRETED
from equipoise.ops.triton.order import most_tiles, sort_by_key, tiles_of
from equipoise.routing import BiasBalance, SwitchLoss, TopK

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # in rows that are never stored
]
ACTIVATIONS = ("swiglu", "gelu", "clamped_swiglu")
# The interpreter cuts bits off where a GPU rounds fp32 to bf16, so its limit is twice that of rounding.
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def on_their_device():
    """Tensors are made where the kernels run."""
    with torch.device("cpu" if INTERPRETED.value else "cuda"):
        yield


def problem(T, K, E, D, F, *, activation="swiglu", dtype=torch.float32, choose=None, drop=0.0, scattered=False):
    """(x, weights, up, down), the plan from weights, in dtype. choose: (T, K) expert ids."""
    H = pre_activation_dim(F, activation)
    ids = torch.rand(T, E).topk(K).indices if choose is None else torch.as_tensor(choose)
    keep = torch.rand(T * K) >= drop if drop else None
    tensors = (torch.randn(T, D), torch.rand(T * K), torch.randn(E, H, D) / D**0.5, torch.randn(E, D, F) / F**0.5)
    if activation == "clamped_swiglu" and dtype == torch.float32:  # in 16 bits z is rounded to just the edge of the
        tensors = (tensors[0] * 6, *tensors[1:])  # clamp, where the slope jumps; fp32 does reach the limits
    args = [tensor.to(torch.float32 if i == 1 else dtype).requires_grad_() for i, tensor in enumerate(tensors)]

    def plan(weights: torch.Tensor) -> RaggedPlan:
        tokens = torch.arange(T).repeat_interleave(K)
        return ragged_plan(tokens, ids.reshape(-1), weights, E, top_k=None if scattered else K, keep_N=keep)

    return args, plan


def outcome(backend, args, plan, activation, cotangent):
    y = backend(args[0], plan(args[1]), args[2], args[3], activation)
    return [y.detach(), *torch.autograd.grad(y, args, cotangent.to(y.dtype))]


def errors(args, plan, activation="swiglu"):
    """Relative errors of output and gradients of x, weights, up and down against the loop in fp64."""
    cotangent = torch.randn(args[0].shape).to(args[0].dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in args]
    expected = outcome(reference_experts, exact, plan, activation, cotangent)
    actual = outcome(triton_experts, args, plan, activation, cotangent)
    assert [a.dtype for a in actual] == [args[0].dtype, *(tensor.dtype for tensor in args)]
    return [float((a.double() - e).norm() / (e.norm() + 1e-30)) for a, e in zip(actual, expected, strict=True)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_output_and_gradients_are_the_reference_loops(dtype, activation):
    """D and F no powers of two and longer than a tile, a fifth of the assignments dropped, loads uneven."""
    args, plan = problem(13, 3, 5, 72, 88, activation=activation, dtype=dtype, drop=0.2)
    assert max(errors(args, plan, activation)) < LIMITS[dtype]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_rows_without_a_fixed_number_per_token(activation, drop):
    args, plan = problem(9, 2, 4, 20, 12, activation=activation, drop=drop, scattered=True)
    assert max(errors(args, plan, activation)) < LIMITS[torch.float32]


ALL_TO_ONE = [[3, 1]] * 41  # 41 rows are 2 tiles of 16 and one of 9; experts 0, 2, 4, 5 have none


@pytest.mark.parametrize(
    ("sizes", "choose"),
    [
        ((7, 1, 1, 8, 8), None),  # one expert
        ((6, 4, 4, 8, 8), None),  # all experts
        ((1, 2, 8, 24, 40), None),  # one token: a decode step
        ((1, 1, 1, 4, 4), None),
        ((41, 2, 6, 16, 16), ALL_TO_ONE),
        ((16, 1, 2, 16, 16), [[0]] * 16),  # exactly a tile
        ((300, 2, 2, 20, 36), None),  # tiles of 64
        ((150, 1, 3, 132, 8), None),
    ],
    ids=str,
)
def test_edges(sizes, choose):
    args, plan = problem(*sizes, choose=choose)
    assert max(errors(args, plan)) < LIMITS[torch.float32]


def test_tiles_of_128_rows_in_16_bit():
    args, plan = problem(300, 1, 2, 24, 40, dtype=torch.float16)
    assert cut_for(300, 2, 2, 2**18).rows == 128
    assert max(errors(args, plan)) < LIMITS[torch.float16]


@settings(max_examples=5)
@given(st.data())
def test_any_sizes_and_any_loads(data):
    T, E = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    K = data.draw(st.integers(1, E))
    D, F = 4 * data.draw(st.integers(1, 18)), 4 * data.draw(st.integers(1, 18))
    ids = [data.draw(st.permutations(range(E)))[:K] for _ in range(T)]
    drop, scattered = data.draw(st.sampled_from([0.0, 0.5])), data.draw(st.booleans())
    args, plan = problem(T, K, E, D, F, choose=ids, drop=drop, scattered=scattered)
    assert max(errors(args, plan)) < 1e-5


@pytest.mark.parametrize("backend", [triton_experts, lean_experts])
def test_nothing_to_do_gives_zeros_and_zero_gradients(backend):
    args, _ = problem(4, 2, 3, 8, 8)
    nobody = torch.zeros(8, dtype=torch.bool)
    plan = ragged_plan(torch.arange(4).repeat_interleave(2), torch.arange(8) % 3, args[1], 3, top_k=2, keep_N=nobody)
    y = backend(args[0], plan, args[2], args[3], "swiglu")
    assert not y.any()
    for grad in torch.autograd.grad(y.sum(), args):
        assert not grad.any()  # zeros, not None and not what was left in memory


def test_an_empty_batch():
    args, plan = problem(0, 2, 3, 8, 8)
    y = triton_experts(args[0], plan(args[1]), args[2], args[3], "swiglu")
    assert y.shape == (0, 8)
    assert [grad.shape for grad in torch.autograd.grad(y.sum(), args)] == [(0, 8), (0,), (3, 16, 8), (3, 8, 8)]


def test_dropped_rows_are_never_read():
    """Whatever is in the memory of rows beyond the last expert's, NaN too, must not reach a sum."""
    args, plan = problem(6, 2, 3, 8, 8, drop=0.5)
    cut = plan(args[1])
    tiles = tiles_of(cut.counts_e, 12, 4)
    y_RD = torch.full((12, 8), math.nan)
    y_RD[: int(cut.counts_e.sum())] = 1.0
    for rows_TK in (cut.rows_TK, None):
        y_TD = launch.sum_of_rows(y_RD, cut.token_ids_R, rows_TK, 6, tiles)
        kept_T = torch.bincount(cut.token_ids_R[: int(cut.counts_e.sum())], minlength=6)
        assert torch.equal(y_TD, kept_T[:, None].expand(6, 8).float())


def test_the_same_bits_twice():
    args, plan = problem(33, 3, 5, 40, 24, drop=0.2, scattered=True)
    cotangent = torch.randn(33, 40)
    first, second = (outcome(triton_experts, args, plan, "swiglu", cotangent) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_gradients_nothing_is_kept_and_the_result_is_the_same():
    args, plan = problem(9, 2, 4, 16, 16)
    cut = plan(args[1])
    with torch.no_grad():
        without = triton_experts(args[0], cut, args[2], args[3], "swiglu")
    assert torch.equal(without, triton_experts(args[0], cut, args[2], args[3], "swiglu").detach())
    _, z_RH = triton_forward(*(t.detach() for t in (args[0], cut.weights_R, args[2], args[3])), cut.token_ids_R,
                             cut.rows_TK, cut.counts_e, "swiglu", save=False)  # fmt: skip
    assert z_RH.shape == (0, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_kept_for_backward_is_that_of_the_lean_path(dtype):
    T, K, E, D, F = 16, 2, 4, 8, 24
    args, plan = problem(T, K, E, D, F, dtype=dtype)

    def kept(backend) -> int:
        saved: dict[int, int] = {}

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        cut = plan(args[1].detach().requires_grad_())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            backend(args[0], cut, args[2], args[3], "swiglu")
        for parameter in (args[2], args[3]):
            del saved[parameter.untyped_storage().data_ptr()]
        return sum(saved.values())

    indices = 4 * T * K + 8 * T * K + 8 * T * K + 8 * (E + 1)  # weights, token_ids, rows, counts
    expected = (T * D + T * K * 2 * F) * dtype.itemsize + indices
    assert kept(triton_experts) == kept(lean_experts) == expected
    if dtype == torch.bfloat16:
        assert expected - indices == 2 * T * D + 4 * T * K * F


# ---------------------------------------------------------------------------------------------- order


def slow_table(counts: list[int], rows_per_tile: int) -> list[tuple[int, int, int]]:
    table, start = [], 0
    for expert, count in enumerate(counts):
        table += [(expert, first, start + count) for first in range(start, start + count, rows_per_tile)]
        start += count
    return table


def test_the_tile_table_by_hand():
    """Rows 0-4 are expert 0's, 5-37 expert 2's, row 38 expert 3's; tiles of 16: one, none, three, one."""
    tiles = tiles_of(torch.tensor([5, 0, 33, 1]), 45, 4)  # six rows were dropped
    assert tiles.cut.rows == 16
    assert tiles.num_tiles == 45 // 16 + 4
    there = [(0, 0, 5), (2, 5, 38), (2, 21, 38), (2, 37, 38), (3, 38, 39)]
    assert list(zip(*tiles.table.tolist(), strict=True)) == [*there, (-1, 0, 0)]
    assert tiles.ends_e.tolist() == [5, 5, 38, 39]


@settings(max_examples=15)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=40), st.integers(0, 30))
def test_the_tile_table_is_the_loops_and_has_room(counts, dropped):
    num_rows = sum(counts) + dropped
    if num_rows == 0:
        return
    tiles = tiles_of(torch.tensor(counts), num_rows, 2)
    expected = slow_table(counts, tiles.cut.rows)
    assert len(expected) <= tiles.num_tiles == most_tiles(num_rows, len(counts), tiles.cut.rows)
    nothing = [(-1, 0, 0)] * (tiles.num_tiles - len(expected))
    assert list(zip(*tiles.table.tolist(), strict=True)) == expected + nothing


@given(st.integers(0, 700), st.integers(1, 130), st.integers(0, 2**31))
@settings(max_examples=8)
def test_the_sort_is_the_stable_one(num, num_keys, seed):
    torch.manual_seed(seed)
    keys = torch.randint(num_keys, (num,))
    for actual, expected in zip(sort_by_key(keys, num_keys), ragged.sort_on_device(keys, num_keys), strict=True):
        assert actual.dtype == torch.int64
        assert torch.equal(actual, expected)


# ---------------------------------------------------------------------------------------------- operators and layer


def test_opcheck_of_the_operators():
    args, plan = problem(5, 2, 4, 8, 8, drop=0.3)
    x, weights, up, down = (tensor.detach() for tensor in args)
    cut = plan(weights)
    indices = (cut.token_ids_R, cut.rows_TK, cut.counts_e)
    z = x.new_zeros(10, 16)
    torch.library.opcheck(triton_forward, (x, cut.weights_R, up, down, *indices, "swiglu", False))
    torch.library.opcheck(triton_backward, (x, x, z, cut.weights_R, up, down, *indices, "swiglu"))
    torch.library.opcheck(torch.ops.equipoise.triton_sort.default, (torch.tensor([2, 0, 1, 2]), 3))


@pytest.mark.parametrize("capacity", [None, Capacity(1.0, "position")], ids=["dropless", "capped"])
def test_a_training_layer_is_the_same_with_lean_and_with_triton(capacity):
    layers = [MoE(24, 16, 6, router=TopK(k=2), balance=(BiasBalance(), SwitchLoss()), capacity=capacity)]
    layers.append(copy.deepcopy(layers[0]))
    asked = MoE(24, 16, 6, router=TopK(k=2), balance=(BiasBalance(), SwitchLoss()), capacity=capacity, backend="triton")
    asked.load_state_dict(layers[0].state_dict())
    layers[1] = asked
    assert "backend=triton (asked for)" in repr(asked.experts)
    x, results = torch.randn(2, 19, 24), []
    for layer in layers:
        mine = x.clone().requires_grad_()
        y = layer(mine)
        y.square().sum().backward()
        results.append([y.detach(), mine.grad, *(parameter.grad for parameter in layer.parameters())])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_compiles_into_one_graph(training):
    """With fullgraph .item(), .tolist() or sizes that depend on the routing would be errors: nothing asks the host."""
    layer = MoE(16, 16, 4, router=TopK(k=2), balance=(BiasBalance(),), backend="triton").train(training)
    x = torch.randn(1, 11, 16)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    if training:
        compiled(x).sum().backward()
        assert layer.experts.down_proj.grad.any()


def test_fp64_is_refused():
    args, plan = problem(4, 2, 3, 8, 8, dtype=torch.float64)
    message = (
        r'backend="triton": expected one of torch.float32, torch.bfloat16, torch.float16, got torch.float64; convert'
    )
    with pytest.raises(ValueError, match=message):
        triton_experts(args[0], plan(args[1]), args[2], args[3], "swiglu")


def test_experts_take_views():
    experts = Experts(3, 8, 8, backend="triton")
    args, plan = problem(5, 2, 3, 8, 8)
    x = torch.randn(8, 5).t()
    actual = experts(x, plan(args[1]))
    torch.testing.assert_close(actual, experts(x.contiguous(), plan(args[1])))
