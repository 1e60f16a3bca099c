"""`equipoise.layer.MoE` with each of its backends, as variants. A new backend appears by itself."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import nn

from equipoise.bench.problem import Candidate, Check, Layer, LeftOutError, Problem, Shape, grad_of
from equipoise.layer import MoE
from equipoise.layer.experts import BACKENDS, BackendName, backend_for
from equipoise.routing import TopK

DEVICES = {"triton": "cuda", "native": "cpu", "native_few": "cpu"}
SLOW = ("reference",)  # the loop that the others are compared with in tests
NO_TRAINING = (
    "few",
    "native_few",
)  # made for decode steps; autograd differentiates it, and keeps several times as much


def equipoise_moe(problem: Problem, backend: BackendName) -> Layer:
    """`equipoise.MoE` with one of its backends."""
    shape = problem.shape
    with torch.device("meta"):
        module = MoE(shape.dim, shape.hidden_dim, shape.num_experts, router=TopK(k=shape.top_k), backend=backend)
    module.router.weight = nn.Parameter(problem.router_ED)
    module.experts.gate_up_proj = nn.Parameter(problem.up_EHD)
    module.experts.down_proj = nn.Parameter(problem.down_EDF)
    weights = (module.router.weight, module.experts.gate_up_proj, module.experts.down_proj)
    return Layer(module, module, lambda: tuple(grad_of(weight) for weight in weights))


def our_variants() -> tuple[Candidate, ...]:
    """One for each backend but the slow ones."""
    return tuple(
        Candidate(
            f"equipoise {name}",
            "moe",
            partial(equipoise_moe, backend=cast(BackendName, name)),
            _runs_here(name),
            trains=name not in NO_TRAINING,
            device=DEVICES.get(name),
        )
        for name in BACKENDS
        if name not in SLOW
    )


def _runs_here(name: str) -> Check:
    """Leaves out what this machine, or this size, would compute by another backend, or not at all."""

    def check(shape: Shape, num_tokens: int, dtype: torch.dtype) -> None:
        if name not in ("native", "native_few"):
            return
        x_TD, up_EHD, down_EDF = (
            torch.empty(size, dtype=dtype)
            for size in ((1, shape.dim), (1, 2 * shape.hidden_dim, shape.dim), (1, shape.dim, shape.hidden_dim))
        )
        with torch.set_grad_enabled(name == "native"):
            taken, why = backend_for(cast(BackendName, name), x_TD, up_EHD, down_EDF, 1)
        if taken != name:
            raise LeftOutError(why)

    return check


def picked(problem: Problem, num_tokens: int, training: bool) -> str:
    """The variant that backend="auto" is."""
    with torch.set_grad_enabled(training):
        x_TD, num_rows = problem.x_TD[:num_tokens], num_tokens * problem.shape.top_k
        name, _ = backend_for("auto", x_TD, problem.up_EHD, problem.down_EDF, num_rows)
    return f"equipoise {name}"
