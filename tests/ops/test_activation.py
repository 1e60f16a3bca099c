import math

import pytest
import torch

from equipoise.ops.activation import activate, activate_backward, check_activation, pre_activation_dim, recompute

ACTIVATIONS = pytest.mark.parametrize("activation", ["swiglu", "gelu", "clamped_swiglu"])


@ACTIVATIONS
def test_backward_is_the_derivative_of_forward(activation):
    z = torch.randn(5, pre_activation_dim(6, activation), dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        z[0] *= 20  # beyond the limits of clamped_swiglu
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


def test_clamped_swiglu_by_hand():
    # gate 9 -> 7, up -8 -> -7: 7 sigmoid(11.914) (-7 + 1) = -42 + tiny; gate 0 gives 0; gate -9 is not clamped
    got = activate(torch.tensor([[9.0, -8.0], [0.0, 5.0], [-9.0, 1.0]]), "clamped_swiglu")
    assert got[:, 0].tolist() == pytest.approx([-42 / (1 + math.exp(-11.914)), 0.0, -18 / (1 + math.exp(15.318))])


def test_refuses_unknown_names():
    with pytest.raises(ValueError, match=r"activation: expected one of swiglu, gelu, clamped_swiglu, got 'relu'"):
        check_activation("relu")
