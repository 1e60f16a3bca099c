"""Sinkhorn in the log domain against the plain multiplicative iteration, its marginals, and logits of any size."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from equipoise.ops.sinkhorn import sinkhorn_log


def multiplicative(logits: list[list[float]], iterations: int, tolerance: float | None = None) -> list[list[float]]:
    """Scale rows to 1/T, then columns to 1/E, over and over. With a tolerance: until v moves by less on average."""
    T, E = len(logits), len(logits[0])
    kernel = [[math.exp(z) for z in row] for row in logits]
    u, v = [0.0] * T, [1.0] * E
    for _ in range(iterations):
        old = v
        u = [1 / T / sum(kernel[t][e] * v[e] for e in range(E)) for t in range(T)]
        v = [1 / E / sum(kernel[t][e] * u[t] for t in range(T)) for e in range(E)]
        if tolerance is not None and sum(abs(a - b) for a, b in zip(v, old, strict=True)) / E < tolerance:
            break
    return [[u[t] * kernel[t][e] * v[e] for e in range(E)] for t in range(T)]


def logits(T: int, E: int, spread: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random, with experts that everybody likes and experts that nobody does."""
    return (spread * (torch.randn(T, E) + torch.randn(E))).to(dtype)


@given(
    T=st.integers(1, 7),
    E=st.integers(1, 5),
    iterations=st.integers(1, 12),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_multiplicative_iteration(T, E, iterations, spread, seed):
    torch.manual_seed(seed)
    z = logits(T, E, spread)
    plan = torch.tensor(multiplicative(z.tolist(), iterations), dtype=torch.float64)
    torch.testing.assert_close(sinkhorn_log(z, iterations), plan.log(), rtol=1e-9, atol=1e-9)


def test_hand_worked():
    # exp(z) = [[1, 3], [1, 1]], T = E = 2. u = (1/2)/(4, 2) = (1/8, 1/4). Columns of diag(u) exp(z): 3/8 and 5/8,
    # so v = (1/2)/(3/8, 5/8) = (4/3, 4/5): plan [[1/6, 3/10], [1/3, 1/5]]
    z = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[1 / 6, 3 / 10], [1 / 3, 1 / 5]], dtype=torch.float64)
    torch.testing.assert_close(sinkhorn_log(z, 1).exp(), expected, rtol=1e-14, atol=0)


def test_comes_to_where_an_iteration_with_a_tolerance_stops():
    z = logits(40, 6)
    stopped = torch.tensor(multiplicative(z.tolist(), 1000, tolerance=1e-9), dtype=torch.float64)
    torch.testing.assert_close(sinkhorn_log(z, 50).exp(), stopped, rtol=1e-7, atol=0)


@pytest.mark.parametrize(("spread", "iterations"), [(1.0, 5), (4.0, 20), (30.0, 500)])
def test_iterations_that_the_docstring_names_bring_rows_within_a_percent(spread, iterations):
    plan = sinkhorn_log(torch.randn(1024, 32) * spread, iterations).exp()
    assert (plan.sum(1) * 1024 - 1).abs().max() < 0.01
    torch.testing.assert_close(plan.sum(0), torch.full((32,), 1 / 32), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marginals_after_many_iterations(dtype):
    plan = sinkhorn_log(logits(96, 8, dtype=dtype), 100).exp()
    assert plan.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(plan.sum(1), torch.full((96,), 1 / 96, dtype=dtype), rtol=tolerance, atol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((8,), 1 / 8, dtype=dtype), rtol=tolerance, atol=0)
    assert plan.sum().item() == pytest.approx(1.0, rel=tolerance)


def test_a_constant_added_to_a_row_changes_nothing():
    z = logits(20, 5)
    shift = 1e3 * torch.randn(20, 1, dtype=torch.float64)
    torch.testing.assert_close(sinkhorn_log(z + shift, 3), sinkhorn_log(z, 3), rtol=0, atol=1e-11)


def test_a_constant_added_to_a_column_changes_nothing_in_the_end():
    """An expert that all like by the same amount is not liked any more: this is what balances."""
    z = logits(20, 5)
    shifted = z + 3 * torch.randn(5, dtype=torch.float64)
    assert not torch.allclose(sinkhorn_log(shifted, 1), sinkhorn_log(z, 1), rtol=0, atol=0.1)
    torch.testing.assert_close(sinkhorn_log(shifted, 200), sinkhorn_log(z, 200), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_logits_do_not_overflow(dtype, scale):
    z = (scale * torch.sign(torch.randn(32, 6))).to(dtype)
    z[0], z[1] = scale, -scale  # rows without a preference
    log_plan = sinkhorn_log(z, 30)
    assert log_plan.isfinite().all()
    torch.testing.assert_close(log_plan.exp().sum(0), torch.full((6,), 1 / 6, dtype=dtype), rtol=1e-2, atol=0)


def test_one_expert_that_all_prefer_by_1e4_still_gets_only_its_share():
    z = torch.zeros(12, 3)
    z[:, 1] = 1e4
    torch.testing.assert_close(sinkhorn_log(z, 20).exp(), torch.full((12, 3), 1 / 36), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("T", "E"), [(0, 3), (0, 1), (1, 1), (1, 4), (5, 1)])
def test_small_shapes(T, E):
    plan = sinkhorn_log(torch.randn(T, E), 3).exp()
    # with one token or one expert there is only one plan: everything is shared evenly
    torch.testing.assert_close(plan, torch.full((T, E), 1 / max(T * E, 1)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_computed_in_fp32(dtype):
    z = logits(20, 5, dtype=dtype)
    assert torch.equal(sinkhorn_log(z, 4), sinkhorn_log(z.float(), 4))


def test_gradients():
    z = logits(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: sinkhorn_log(z, 3), (z,))


def test_compiles_without_a_graph_break_for_any_number_of_tokens():
    torch._dynamo.reset()
    compiled = torch.compile(sinkhorn_log, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in (7, 12, 30):
            z = logits(T, 4, dtype=torch.float32)
            torch.testing.assert_close(compiled(z, 5), sinkhorn_log(z, 5))


def test_bad_input():
    with pytest.raises(
        ValueError, match=r"iterations: expected at least 1, got 0; none would leave the logits as they"
    ):
        sinkhorn_log(torch.zeros(2, 2), 0)
    for shape in ((2, 3, 4), (4,), (4, 0)):
        with pytest.raises(ValueError, match=r"logits_TE: expected shape \(tokens, experts\), at least 1 expert, got"):
            sinkhorn_log(torch.zeros(shape), 1)
