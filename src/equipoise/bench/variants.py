"""Everything that is compared, and the plain twin that each kind is compared with in fp32.

A further peer is one file in `peers`, and one line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from equipoise.bench.dense import DENSE, dense_fused
from equipoise.bench.harness import require_same
from equipoise.bench.ours import our_variants
from equipoise.bench.peers import article, st_moe, torchtitan, transformers
from equipoise.bench.problem import Candidate, Layer, LeftOutError, Problem, plain_moe

TWINS: Mapping[str, Callable[[Problem], Layer]] = {
    "moe": plain_moe,
    "dense": dense_fused,
    "article": article.article_twin,
    "int8": plain_moe,
    "int4": plain_moe,
}
LIMITS = {  # relative error against the twin, by what is computed and by type
    "int8": {torch.bfloat16: 3e-2, torch.float32: 3e-2},
    "int4": {torch.bfloat16: 0.25, torch.float32: 0.25},
}
ERROR_LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


def variants() -> tuple[Candidate, ...]:
    """Ours, the dense ceilings, then the peers."""
    return (
        *our_variants(),
        *DENSE,
        *transformers.VARIANTS,
        *torchtitan.VARIANTS,
        *st_moe.VARIANTS,
        *article.VARIANTS,
    )


def available(
    candidates: tuple[Candidate, ...],
    problem: Problem,
    num_tokens: int,
    only: tuple[str, ...] = (),
    training: bool = False,
) -> tuple[dict[str, Candidate], list[str]]:
    """(the variants of those asked for that can run with so many tokens, a note for each that can't).

    only: parts of names; empty for all. Raises ValueError where one of them is in no name.
    """
    for part in only:
        if not any(part in candidate.name for candidate in candidates):
            raise ValueError(f"only: {part!r} is in none of {', '.join(c.name for c in candidates)}")
    can_run, notes = {}, []
    for candidate in candidates:
        if (only and not any(part in candidate.name for part in only)) or (training and not candidate.trains):
            continue
        if candidate.device not in (None, problem.x_TD.device.type):
            notes.append(f"{candidate.name} left out: it is for {candidate.device}.")
            continue
        try:
            candidate.check(problem.shape, num_tokens, problem.x_TD.dtype)
            can_run[candidate.name] = candidate
        except LeftOutError as reason:
            notes.append(f"{candidate.name} left out: {reason}.")
    return can_run, notes


def limit_of(candidate: Candidate, dtype: torch.dtype) -> float:
    """The relative error that is let pass."""
    return LIMITS.get(candidate.computes, ERROR_LIMITS)[dtype]


def trained_layers(problem: Problem, candidates: Mapping[str, Candidate]) -> tuple[dict[str, Layer], dict[str, float]]:
    """(the built layers, their relative errors against fp32, in output and gradients).

    Raises ValueError when one computes something else.
    """
    exact, expected = problem.float(), {}
    for kind in {candidate.computes for candidate in candidates.values()}:
        expected[kind] = outcome(TWINS[kind](exact), exact)
    layers, errors = {}, {}
    for name, candidate in candidates.items():
        layer = layers[name] = candidate.build(problem)
        limit = limit_of(candidate, problem.x_TD.dtype)
        errors[name] = require_same(name, outcome(layer, problem), expected[candidate.computes], limit)
        drop_gradients(layer)
    return layers, errors


def inference_errors(
    problem: Problem, candidates: Mapping[str, Candidate], layers: Mapping[str, Layer], num_tokens: int
) -> dict[str, float]:
    """Relative errors of the outputs of the first num_tokens tokens against fp32. Puts the layers into eval.

    Raises ValueError when one computes something else.
    """
    x_TD, exact, expected, errors = problem.x_TD[:num_tokens], problem.float(), {}, {}
    with torch.inference_mode():
        for kind in {candidates[name].computes for name in layers}:
            expected[kind] = TWINS[kind](exact).forward(x_TD.float())
        for name, layer in layers.items():
            layer.module.eval()
            limit = limit_of(candidates[name], x_TD.dtype)
            errors[name] = require_same(name, [layer.forward(x_TD)], [expected[candidates[name].computes]], limit)
    return errors


def outcome(layer: Layer, problem: Problem) -> tuple[Tensor, ...]:
    """Output, and the gradients of the input and the weights."""
    x_TD = problem.x_TD.clone().requires_grad_()
    y_TD = layer.forward(x_TD)
    torch.autograd.backward(y_TD, problem.grad_TD)
    assert x_TD.grad is not None
    return y_TD.detach(), x_TD.grad, *layer.gradients()


def drop_gradients(layer: Layer, x_TD: Tensor | None = None) -> None:
    """Free the gradients of the weights, and of x."""
    layer.module.zero_grad(set_to_none=True)
    if x_TD is not None:
        x_TD.grad = None
