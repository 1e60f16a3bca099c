"""The same random small model with transformers' loop over experts and with ours, and what is compared."""

import copy

import torch
from tests.monitor.transformers_models import build

import equipoise.hf  # noqa: F401  # registers the name

FP32, BF16 = 1e-5, 0.03  # relative error in the Euclidean norm: of sums in another order, of bf16 rounding


def pair(family, dtype=torch.float32, **sizes):
    """(eager, ours): equal weights."""
    theirs = build(family, experts_implementation="eager", **sizes).to(dtype)
    ours = copy.deepcopy(theirs)
    ours.set_experts_implementation("equipoise")
    assert theirs.config._experts_implementation == "eager"
    assert ours.config._experts_implementation == "equipoise"
    return theirs, ours


def error(actual, expected):
    """Relative; of tensors that ought to be zero, absolute."""
    norm = float(expected.double().norm())
    return float(torch.dist(actual.double(), expected.double())) / (norm or 1.0)


def outcome(model, tokens, **arguments):
    """Logits, and the gradient of every parameter by name, of one training forward."""
    model.zero_grad(set_to_none=True)
    out = model(tokens, labels=tokens, **arguments)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, limit, floor=1e-3):
    """Logits and every gradient. One below `floor` times the largest is measured by that: it may be rounding alone."""
    (my_logits, my_grads), (logits, grads) = ours, theirs
    assert error(my_logits, logits) < limit
    assert my_grads.keys() == grads.keys()
    least = floor * max(float(grad.norm()) for grad in grads.values())
    for name, grad in grads.items():
        assert torch.dist(my_grads[name], grad) < limit * max(float(grad.norm()), least), name
