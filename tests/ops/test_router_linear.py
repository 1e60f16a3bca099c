import pytest
import torch

from equipoise.ops.router_linear import ROWS_AT_ONCE, router_linear


def test_gradcheck():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(router_linear, (x, weight))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_is_fp32_whatever_the_dtype_or_autocast(dtype, autocast):
    x = torch.randn(64, 32, dtype=dtype, requires_grad=True)
    weight = torch.randn(8, 32, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = router_linear(x, weight)
    logits.square().sum().backward()
    assert logits.dtype == torch.float32
    assert (x.grad.dtype, weight.grad.dtype) == (dtype, dtype)
    exact = x.detach().double() @ weight.detach().double().t()
    torch.testing.assert_close(logits.detach().double(), exact, rtol=1e-5, atol=1e-5)  # a bf16 product is off by 1e-2
    grad = 2 * exact @ weight.detach().double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(x.grad.double(), grad, rtol=4 * eps, atol=100 * torch.finfo(torch.float32).eps)


def test_many_rows_are_converted_in_parts():
    x = torch.randn(2 * ROWS_AT_ONCE + 5, 8).bfloat16().requires_grad_()
    weight = torch.randn(4, 8).bfloat16().requires_grad_()
    logits = router_linear(x, weight)
    logits.square().sum().backward()
    exact = x.detach().double() @ weight.detach().double().t()
    torch.testing.assert_close(logits.detach().double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), 2 * exact.t() @ x.detach().double(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(x.grad.double(), 2 * exact @ weight.detach().double(), rtol=1e-2, atol=1e-2)


def test_keeps_no_fp32_copy_of_x():
    x = torch.randn(16, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        router_linear(x, weight)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}


def test_gives_no_gradient_that_nobody_asked_for():
    x, weight = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    router_linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 3))
    assert x.grad is None
