"""The experts' activations inside kernels, in fp32. The definitions are those of `equipoise.ops.activation`."""

from __future__ import annotations

import triton
import triton.language as tl

from equipoise.ops import activation

_LIMIT, _ALPHA = tl.constexpr(activation.LIMIT), tl.constexpr(activation.ALPHA)
_CUBIC = tl.constexpr(0.044715)  # of gelu's tanh approximation, which is x sigmoid(2 sqrt(2 / pi) (x + CUBIC x^3))
_SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr):
    """a from the two halves of z; gelu has one, in `gate`."""
    if ACTIVATION == "swiglu":
        a = gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "clamped_swiglu":
        capped = tl.minimum(gate, _LIMIT)
        a = capped * tl.sigmoid(capped * _ALPHA) * (tl.minimum(tl.maximum(up, -_LIMIT), _LIMIT) + 1.0)
    else:
        a = gate * tl.sigmoid((gate + gate * gate * gate * _CUBIC) * _SLOPE)
    return a


@triton.jit
def activate_backward(grad_a, gate, up, ACTIVATION: tl.constexpr):
    """(a, gradient of gate, gradient of up); for gelu the last is not meant to be used."""
    if ACTIVATION == "swiglu":
        share = tl.sigmoid(gate)
        gated = gate * share
        a = gated * up
        grad_gate = grad_a * up * (share + gated * (1.0 - share))
        grad_up = grad_a * gated
    elif ACTIVATION == "clamped_swiglu":
        capped = tl.minimum(gate, _LIMIT)
        share = tl.sigmoid(capped * _ALPHA)
        gated = capped * share
        linear = tl.minimum(tl.maximum(up, -_LIMIT), _LIMIT) + 1.0
        a = gated * linear
        grad_gate = tl.where(gate <= _LIMIT, grad_a * linear * (share + gated * (1.0 - share) * _ALPHA), 0.0)
        grad_up = tl.where(tl.abs(up) <= _LIMIT, grad_a * gated, 0.0)
    else:
        share = tl.sigmoid((gate + gate * gate * gate * _CUBIC) * _SLOPE)
        a = gate * share
        inner = (1.0 + gate * gate * (3.0 * _CUBIC)) * _SLOPE
        grad_gate = grad_a * (share + a * (1.0 - share) * inner)
        grad_up = grad_gate
    return a, grad_gate, grad_up
