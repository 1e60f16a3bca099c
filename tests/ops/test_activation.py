import pytest
import torch

from equipoise.ops.activation import activate, activate_backward, check_activation, pre_activation_dim, recompute

ACTIVATIONS = pytest.mark.parametrize("activation", ["swiglu", "gelu"])


@ACTIVATIONS
def test_backward_is_the_derivative_of_forward(activation):
    z = torch.randn(5, pre_activation_dim(6, activation), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: activate(z, activation), z)
    a = activate(z, activation)
    grad_a = torch.randn_like(a)
    (expected,) = torch.autograd.grad(a, z, grad_a)
    again, saved = recompute(z.detach(), activation)
    torch.testing.assert_close(again, a.detach(), rtol=0, atol=0)
    torch.testing.assert_close(activate_backward(grad_a.clone(), z.detach(), saved, activation), expected)


def test_swiglu_takes_the_gate_first():
    # silu(0) = 0 whatever the second half is; silu(x) is about x for large x
    assert activate(torch.tensor([[0.0, 7.0], [50.0, 2.0]]), "swiglu").tolist() == [[0.0], [100.0]]


def test_refuses_unknown_names():
    with pytest.raises(ValueError, match=r"activation: expected one of swiglu, gelu, got 'relu'"):
        check_activation("relu")
