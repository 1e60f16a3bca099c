import pytest
import torch

from equipoise.ops.attach_loss import attach_loss


def test_sends_exactly_the_gradient_of_the_loss():
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    attached = attach_loss(x.sin(), (w * x).square().sum())
    assert torch.equal(attached, x.sin())
    scale = torch.randn(4, dtype=torch.float64)
    actual = torch.autograd.grad((attached * scale).sum(), (x, w))
    # The loss counts once, however the output is scaled afterwards.
    expected = torch.autograd.grad((x.sin() * scale).sum() + (w * x).square().sum(), (x, w))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_reaches_the_loss_when_the_output_needs_no_gradient_of_its_own():
    w = torch.randn(3, requires_grad=True)
    attach_loss(torch.zeros(2), w.square().sum()).sum().backward()
    torch.testing.assert_close(w.grad, 2 * w.detach())


def test_a_loss_in_fp32_fits_an_output_in_bf16():
    x = torch.randn(3, dtype=torch.bfloat16, requires_grad=True)
    attach_loss(x * 1, x.float().square().sum()).sum().backward()
    torch.testing.assert_close(x.grad, 1 + 2 * x.detach())


def test_refuses_a_loss_that_is_no_scalar():
    with pytest.raises(ValueError, match=r"attach_loss: loss must be a scalar, got shape \(3,\); reduce it first"):
        attach_loss(torch.zeros(2), torch.zeros(3))
