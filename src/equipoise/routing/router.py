"""The seam of routers: what a router's config promises, and the module that it builds.

A router is one file with a frozen config and a module, and its line in `equipoise.routing.ROUTERS`. One conformance
suite (tests/routing/test_router_conformance.py) holds every router to what its traits say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from equipoise.types import RoutingDecision


@dataclass(frozen=True)
class Traits:
    """What a router promises; whatever is built on routers relies on these alone.

    causal: in training a token's experts never depend on later tokens. allow_future: the user has accepted it when not.
    takes_bias: a balancer's bias moves its selection. free_choice: to the K best of all experts by what the bias is
    added to, which is what quantile balancing sets its bias for. ranks: each token ranks all experts (`Preferences`).
    fixed_k: every token has exactly K experts. batch_invariant: in eval a token's experts depend on it alone.
    needs_token_ids: it reads token ids, in [0, num_token_ids). weights_sum_to: the sum of a token's weights where it is
    fixed. needs_loss: the name of a balancing loss that it can't do without.
    """

    causal: bool = True
    allow_future: bool = False
    takes_bias: bool = True
    free_choice: bool = True
    ranks: bool = True
    fixed_k: bool = True
    batch_invariant: bool = True
    needs_token_ids: bool = False
    num_token_ids: int | None = None
    weights_sum_to: float | None = None
    needs_loss: str | None = None


class Router(nn.Module, ABC):
    """Decides which experts each token goes to. Its arithmetic is fp32 (fp64 for fp64 inputs) under any autocast.

    config: what it was built from. weight: the linear router (E, D), or None in routers without one.
    """

    config: Any
    weight: Tensor | None

    @abstractmethod
    def init_weights(self, std: float) -> None:
        """Draw the parameters; std is the model's, used where the config names none."""

    @abstractmethod
    def forward(self, x_TD: Tensor, bias_E: Tensor | None = None, token_ids_T: Tensor | None = None) -> RoutingDecision:
        """Decide for T real tokens. bias_E (E,) fp32 is added for the selection only. token_ids_T: int64."""

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return repr(self.config)


class LinearRouter(Router):
    """A router whose only parameter is weight (E, D), drawn with the model's standard deviation."""

    weight: Tensor

    def __init__(self, config: RouterConfig, dim: int, num_experts: int) -> None:
        super().__init__()
        check_k(type(config).__name__, config.k, num_experts)
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.init_weights(0.02)

    def init_weights(self, std: float) -> None:
        """Draw the weight."""
        init_linear(self.weight, std)


class RouterConfig(Protocol):
    """A frozen dataclass that says which router, with which options."""

    @property
    def k(self) -> int:
        """K, experts per token; the mean to aim at where it varies."""
        ...

    @property
    def traits(self) -> Traits:
        """What it promises with these options."""
        ...

    def build(self, dim: int, num_experts: int) -> Router:
        """The router for inputs of size dim. Raises ValueError when it can't work with num_experts."""
        ...


def build_on(config: RouterConfig, weight_ED: Tensor) -> Router:
    """Another router on the same linear weight, which it shares: (E, D)."""
    E, D = weight_ED.shape
    with torch.device("meta"):
        router = config.build(D, E)
    router.weight = weight_ED
    return router


def num_parameters(config: RouterConfig, dim: int, num_experts: int) -> int:
    """Of the router, without making it."""
    with torch.device("meta"):  # shapes only
        return sum(parameter.numel() for parameter in config.build(dim, num_experts).parameters())


Init = Literal["normal", "truncated", "orthogonal"]


def init_linear(weight_ED: Tensor, std: float, init: Init = "normal") -> None:
    """Draw a router's weight in place. "truncated" at two standard deviations; "orthogonal" has unit rows instead."""
    if init == "orthogonal":
        nn.init.orthogonal_(weight_ED)
    elif init == "truncated":
        nn.init.trunc_normal_(weight_ED, std=std, a=-2 * std, b=2 * std)
    else:
        nn.init.normal_(weight_ED, std=std)


def normalized(scores_TE: Tensor) -> Tensor:
    """Non-negative scores with each row divided by its sum, as probabilities for losses and statistics."""
    return scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(scores_TE.dtype).tiny)


def check_k(owner: str, k: int, num_experts: int | None = None) -> None:
    """Raise ValueError unless 1 <= k <= num_experts."""
    if k < 1:
        raise ValueError(f"{owner}.k: expected at least 1, got {k}")
    if num_experts is not None and k > num_experts:
        raise ValueError(f"{owner}.k: expected at most num_experts = {num_experts}, got {k}; lower k or add experts")


def refuse_bias(owner: str, bias_E: Tensor | None, why: str) -> None:
    """Raise ValueError when a bias reaches a router that can't use it."""
    if bias_E is not None:
        raise ValueError(f"{owner}: a balancer's bias does not move its selection, {why}; remove the balancer")
