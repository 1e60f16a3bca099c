"""torchtitan's MoE on one device: a router, a sort, three grouped products: github.com/pytorch/torchtitan.

`torchtitan/models/common/moe.py`. It imports triton and some fifty packages, so no extra here has it: `pip install
torchtitan triton spmd-types` into an environment of its own. Its experts compute in bf16 whatever comes in.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import nn

from equipoise.bench.problem import Candidate, Layer, LeftOutError, Problem, Shape, grad_of


def torchtitan_moe(problem: Problem) -> Layer:
    """Its MoE with softmax scores, normalised over the K best."""
    common = "torchtitan.models.common"
    moe, linear = import_module(f"{common}.moe"), import_module(f"{common}.linear")
    dispatcher = import_module(f"{common}.token_dispatcher")
    D, F, E, K = (getattr(problem.shape, name) for name in ("dim", "hidden_dim", "num_experts", "top_k"))
    gate = linear.Linear.Config(in_features=D, out_features=E, bias=False)
    config = moe.MoE.Config(
        num_experts=E,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(dim=D, hidden_dim=F, num_experts=E),
            token_dispatcher=dispatcher.LocalTokenDispatcher.Config(num_experts=E, top_k=K),
        ),
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=E, gate=gate, top_k=K, score_func="softmax", route_norm=True
        ),
        load_balance_coeff=None,
    )
    with torch.device("meta"):
        module = moe.MoE(config)
    experts = module.routed_experts.inner_experts
    gate_EFD, value_EFD = (half.contiguous() for half in problem.up_EHD.chunk(2, dim=1))
    module.router.gate.weight = nn.Parameter(problem.router_ED)
    experts.w1_EFD, experts.w3_EFD = nn.Parameter(gate_EFD), nn.Parameter(value_EFD)
    experts.w2_EDF = nn.Parameter(problem.down_EDF)
    module.tokens_per_expert_E = torch.zeros(E)

    def gradients() -> tuple[torch.Tensor, ...]:
        up_EHD = torch.cat([grad_of(experts.w1_EFD), grad_of(experts.w3_EFD)], dim=1)
        return grad_of(module.router.gate.weight), up_EHD, grad_of(experts.w2_EDF)

    return Layer(module, lambda x_TD: module(x_TD[None])[0], gradients)


def needs_torchtitan(shape: Shape, num_tokens: int, dtype: torch.dtype) -> None:
    """Raise LeftOutError where it can't be imported, or would compute in another type."""
    try:
        import_module("torchtitan.models.common.moe")
    except ImportError as error:
        raise LeftOutError(
            f"torchtitan can't be imported ({error}); pip install torchtitan triton spmd-types"
        ) from None
    if dtype != torch.bfloat16:
        raise LeftOutError("its experts compute in bf16 only")


VARIANTS = (Candidate("torchtitan", "moe", torchtitan_moe, needs_torchtitan),)
