"""grouped_linear equals a loop over rows, forward and backward, eager and compiled, and Grouping is a stable sort."""

import pytest
import torch
from torch import Tensor

from equipoise.ops.grouped_linear import Grouping, grouped_linear

M, D, H, E = 7, 16, 8, 5
# PyTorch's own deprecation inside its compiler: it makes an instance of each Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def by_row(x_MD: Tensor, source_R: Tensor, counts_e: Tensor, weight_eHD: Tensor) -> Tensor:
    """The slow twin: one row and its expert's matrix at a time."""
    experts = [e for e, count in enumerate(counts_e.tolist()) for _ in range(count)]
    rows = [weight_eHD[e] @ x_MD[m] for e, m in zip(experts, source_R.tolist(), strict=True)]
    return torch.stack(rows) if rows else x_MD.new_zeros(0, weight_eHD.shape[1])


def problem(counts: list[int], dtype=torch.float64, sizes=(D, H)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows drawn from x with repetition; x and the weights want gradients."""
    width, height = sizes
    x = torch.randn(M, width, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), height, width, dtype=torch.float64).to(dtype).requires_grad_()
    return x, torch.randint(0, M, (sum(counts),)), torch.tensor(counts), weight


def results(run, x, source_R, counts_e, weight) -> list[Tensor]:
    """Output and both gradients, in fp64."""
    y = run(x, source_R, counts_e, weight)
    slope = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    found = [y, *torch.autograd.grad((y.double() * slope).sum(), [x, weight])]
    return [each.detach().double() for each in found]


COUNTS = {"all": [3, 1, 4, 2, 2], "idle": [0, 9, 0, 0, 3], "one": [0, 0, 12, 0, 0], "last": [0, 0, 0, 0, 1]}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_output_and_gradients_equal_the_loop(counts, dtype, limit):
    inputs = problem(counts, dtype)
    exact = [each.detach().double().requires_grad_() if each.is_floating_point() else each for each in inputs]
    for mine, right in zip(results(grouped_linear, *inputs), results(by_row, *exact), strict=True):
        assert torch.dist(mine, right) <= limit * right.norm()


def test_an_expert_without_rows_gets_a_gradient_of_zero():
    _, _, of_weight = results(grouped_linear, *problem([2, 0, 1, 0, 0]))
    assert [bool(each.any()) for each in of_weight] == [True, False, True, False, False]


def test_no_rows_give_no_rows_and_gradients_of_zero():
    y, of_x, of_weight = results(grouped_linear, *problem([0] * E))
    assert (y.shape, of_x.shape, of_weight.shape) == ((0, H), (M, D), (E, H, D))
    assert not of_x.any()
    assert not of_weight.any()


def test_gradients_of_gradients_are_those_of_finite_differences():
    x, source_R, counts_e, weight = problem([2, 0, 3], sizes=(3, 2))
    run = lambda x, weight: grouped_linear(x, source_R, counts_e, weight).sin()  # noqa: E731 - linear in each alone
    assert torch.autograd.gradgradcheck(run, (x, weight))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("sizes", [(D, H), (6, 3)], ids=["whole 16 bytes", "odd"])
def test_compiled_without_a_break_equals_eager(counts, sizes):
    torch._dynamo.reset()
    inputs = problem(counts, torch.float32, sizes)
    compiled = torch.compile(grouped_linear, fullgraph=True, backend="aot_eager")
    for mine, right in zip(results(compiled, *inputs), results(grouped_linear, *inputs), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters():
    x, source_R, counts_e, weight = problem(COUNTS["all"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, source_R, counts_e, weight)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32)
    right = by_row(x.detach(), source_R, counts_e, weight.detach())
    assert 0 < torch.dist(y.float(), right) <= 0.02 * right.norm()


def test_grouping_is_a_stable_sort_worked_out_by_hand():
    groups = Grouping.of(torch.tensor([2, 0, 2, 3, 0]), 4)
    # expert 0 has assignments 1 and 4, expert 2 has 0 and 2, expert 3 has 3
    assert groups.order_R.tolist() == [1, 4, 0, 2, 3]
    assert groups.rows_N.tolist() == [2, 0, 3, 4, 1]
    assert groups.counts_e.tolist() == [2, 0, 2, 1]
