"""Experts with any activation, biases and layout, against loops over tokens: outputs and all gradients."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from equipoise.ops.custom_experts import ExpertWeights, grouped_custom_experts, lean_custom_experts
from equipoise.ops.ragged import ragged_plan

T, D, F, E, K = 11, 16, 8, 5, 2
BACKENDS = {"lean": lean_custom_experts, "grouped": grouped_custom_experts}


def clamped(z):
    """gpt_oss: gate and up interleaved, clamped, and an offset of 1."""
    gate, up = z[..., ::2].clamp(max=0.8), z[..., 1::2].clamp(-0.8, 0.8)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def squared_relu(z):
    return torch.relu(z) ** 2


ACTIVATIONS = {"clamped": (clamped, 2 * F), "squared relu": (squared_relu, F)}


@dataclass
class Problem:
    """Stored tensors, all of which want a gradient, and the view of them that is computed with."""

    x: Tensor
    weights: Tensor
    stored: list[Tensor]
    view: ExpertWeights
    ids: Tensor


def problem(H, *, biased, transposed, dtype, ids=None):
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    up, down = (leaf(E, D, H), leaf(E, F, D)) if transposed else (leaf(E, H, D), leaf(E, D, F))
    biases = [leaf(E, H), leaf(E, D)] if biased else []
    view = ExpertWeights(up.mT, down.mT, *biases) if transposed else ExpertWeights(up, down, *biases)
    if ids is None:  # expert 3 gets nothing
        ids = torch.stack([torch.randperm(E - 1, generator=generator)[:K] for _ in range(T)])
        ids[ids == 3] = 4
    wide = torch.promote_types(dtype, torch.float32)
    weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64).to(wide).requires_grad_()
    return Problem(leaf(len(ids), D), weights, [up, down, *biases], view, ids)


def plan_of(p):
    tokens = torch.arange(len(p.ids)).repeat_interleave(p.ids.shape[1])
    return ragged_plan(tokens, p.ids.reshape(-1), p.weights.reshape(-1), E, top_k=p.ids.shape[1])


def by_token(p, activation):
    """One token and one of its experts at a time; experts that there are not (E) give nothing."""
    rows = []
    for t, chosen in enumerate(p.ids.tolist()):
        y = torch.zeros(D, dtype=p.x.dtype)
        for k, expert in enumerate(chosen):
            if expert < E:
                z = p.view.up_eHD[expert] @ p.x[t]
                z = z if p.view.up_bias_eH is None else z + p.view.up_bias_eH[expert]
                out = p.view.down_eDF[expert] @ activation(z)
                out = out if p.view.down_bias_eD is None else out + p.view.down_bias_eD[expert]
                y = y + p.weights[t, k] * out
        rows.append(y)
    return torch.stack(rows)


def gradients(y, p):
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return torch.autograd.grad((y * weight).sum(), [p.x, p.weights, *p.stored], allow_unused=True)


def assert_close(actual, expected, limit):
    for one, other in zip(actual, expected, strict=True):
        right = torch.zeros_like(one) if other is None else other.detach()
        assert torch.dist(one.detach().double(), right.double()) <= limit * max(float(right.double().norm()), 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_outputs_and_gradients(backend, transposed, biased, kind):
    activation, H = ACTIVATIONS[kind]
    p = problem(H, biased=biased, transposed=transposed, dtype=torch.float32)
    y, expected = BACKENDS[backend](p.x, plan_of(p), p.view, activation), by_token(p, activation)
    assert_close([y], [expected], 1e-5)
    mine = gradients(y, p)
    assert_close(mine, gradients(expected, p), 1e-5)
    assert all(not grad[3].any() for grad in mine[2:])  # the expert without tokens: zero, not None, not garbage
    with torch.no_grad():
        assert torch.equal(BACKENDS[backend](p.x, plan_of(p), p.view, activation), y)


def test_in_double_precision_by_finite_differences():
    p = problem(2 * F, biased=True, transposed=True, dtype=torch.float64, ids=torch.tensor([[0, 1], [1, 4], [0, 4]]))

    def forward(x, weights, up, down, up_bias, down_bias):
        q = Problem(x, weights, [], ExpertWeights(up.mT, down.mT, up_bias, down_bias), p.ids)
        return lean_custom_experts(x, plan_of(q), q.view, clamped)

    assert torch.autograd.gradcheck(forward, [p.x, p.weights, *p.stored], eps=1e-6, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16(backend):
    """Rows in tiles on a CPU: the rows of a tile that belong to the next expert must add nothing."""
    ids = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(n))[:K] for n in range(150)])
    p = problem(2 * F, biased=True, transposed=True, dtype=torch.bfloat16, ids=ids)
    exact = problem(2 * F, biased=True, transposed=True, dtype=torch.float64, ids=ids)
    for wide, narrow in zip([exact.x, exact.weights, *exact.stored], [p.x, p.weights, *p.stored], strict=True):
        wide.data.copy_(narrow.data)
    y, expected = BACKENDS[backend](p.x, plan_of(p), p.view, clamped), by_token(exact, clamped)
    assert y.dtype == torch.bfloat16
    assert_close([y, *gradients(y, p)], [expected, *gradients(expected, exact)], 0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_that_are_not_here_give_nothing_and_no_gradient(backend):
    ids = torch.tensor([[E, 1], [2, E], [E, E], [0, 1]])
    p = problem(2 * F, biased=True, transposed=False, dtype=torch.float32, ids=ids)
    y, expected = BACKENDS[backend](p.x, plan_of(p), p.view, clamped), by_token(p, clamped)
    assert_close([y], [expected], 1e-5)
    assert not y[2].any()
    grads = gradients(y, p)
    assert_close(grads, gradients(expected, p), 1e-5)
    assert not grads[1][ids == E].any()


def test_frozen_weights_cost_neither_products_nor_memory():
    """Each of the stored tensors alone wants a gradient, or none does: the others' products are not computed."""
    p = problem(2 * F, biased=True, transposed=True, dtype=torch.float32)
    expected = gradients(lean_custom_experts(p.x, plan_of(p), p.view, clamped), p)
    busy = len(p.ids.unique())
    for wanted in [*range(4), None]:
        stored = [tensor.detach().requires_grad_(n == wanted) for n, tensor in enumerate(p.stored)]
        q = Problem(p.x, p.weights, stored, ExpertWeights(stored[0].mT, stored[1].mT, *stored[2:]), p.ids)
        y = lean_custom_experts(q.x, plan_of(q), q.view, clamped)
        leaves = [q.x, q.weights, *([stored[wanted]] if wanted is not None else [])]
        scale = torch.linspace(-1, 1, y.numel()).view(y.shape)
        with Products() as products:
            grads = torch.autograd.grad((y * scale).sum(), leaves)
        assert_close(grads, [*expected[:2], *([expected[2 + wanted]] if wanted is not None else [])], 1e-5)
        assert products.number == busy * (3 if wanted in (0, 1) else 2)


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the matrix products within."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    p = problem(2 * F, biased=True, transposed=True, dtype=torch.float32, ids=torch.zeros(0, K, dtype=torch.int64))
    y = BACKENDS[backend](p.x, plan_of(p), p.view, clamped)
    assert y.shape == (0, D)
    assert [grad.abs().sum() for grad in gradients(y, p)] == [0] * 6


def test_lean_keeps_less_than_grouped():
    p, kept = problem(2 * F, biased=True, transposed=True, dtype=torch.float32), {}
    known = {tensor.untyped_storage().data_ptr() for tensor in [p.x, p.weights, *p.stored]}
    for name, backend in BACKENDS.items():
        storages = {}

        def pack(tensor, storages=storages):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known and tensor.is_floating_point():
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = backend(p.x, plan_of(p), p.view, clamped)
        kept[name] = sum(storages.values())
        del y
    rows = T * K
    assert kept["lean"] == 4 * rows * (2 * F + 1)  # z and the sorted combine weights
    assert kept["grouped"] > 3 * kept["lean"]
