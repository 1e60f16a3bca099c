"""Every router once: what the conformance suites and the layer's oracle run over.

A new router is covered by its line in `equipoise.routing.ROUTERS`, with its default options. What else of it deserves
a run stands in `VARIANTS`. Nothing is asserted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.layer import MoE
from equipoise.routing import (
    LOSSES,
    ROUTERS,
    ExpertChoice,
    Hash,
    NoisyTopK,
    ReLURouting,
    RoundRobin,
    Sinkhorn,
    Threshold,
    TopK,
    TwoTier,
)
from equipoise.routing.router import Router, Traits
from equipoise.types import RoutingDecision

T, D, E, VOCAB = 24, 8, 8, 64


def as_built(router: Router) -> None:
    """Most routers decide as soon as they are built."""


def warm_up(router: Router) -> None:
    """Let the thresholds see a few steps."""
    while not router.state.warm:
        router.state.observe(router(torch.randn(200, D)))
        router.state.update()


def fit(router: Router) -> None:
    """Balance the table over frequencies of which one is far ahead."""
    router.fit(1000.0 / torch.arange(1, VOCAB + 1))


VARIANTS: dict[type[Any], dict[str, Any]] = {
    TopK: {
        "top1": TopK(k=1),
        "raw": TopK(renormalize=False),
        "sigmoid": TopK(score="sigmoid"),
        "sigmoid-bias-on-logits": TopK(score="sigmoid", bias_on="logits"),
        "softmax-bias-on-scores": TopK(bias_on="scores"),
        "sqrtsoftplus": TopK(k=3, score="sqrtsoftplus", temperature=2.0),
        "post": TopK(order="post", temperature=0.7),
        "v3-groups": TopK(k=3, score="sigmoid", scale=2.5, num_groups=4, top_groups=2),
        "v2-groups": TopK(num_groups=2, group_score="max", renormalize=False),
        "jitter": TopK(jitter=0.1),
    },
    NoisyTopK: {"top3": NoisyTopK(k=3, init_std=0.1)},
    ExpertChoice: {"one": ExpertChoice(k=1)},
    Threshold: {"warm": (Threshold(warmup=3, ema=0.5), warm_up)},
    Sinkhorn: {"top2": Sinkhorn(k=2)},
    Hash: {
        "learned": Hash(VOCAB, k=2, weights="learned", scale=1.5),
        "balanced": (Hash(VOCAB, k=2, table="balanced"), fit),
    },
    TwoTier: {
        "four-groups": TwoTier(num_groups=4),
        "learned-top1": TwoTier(k=1),
        "hash": TwoTier(first="hash", vocab_size=VOCAB),
        "hash-top1": TwoTier(k=1, first="hash", vocab_size=VOCAB),
    },
    RoundRobin: {"one": RoundRobin(k=1), "three": RoundRobin(k=3)},
    ReLURouting: {"one": ReLURouting(k=1)},
}


@dataclass(frozen=True)
class Case:
    """A router to be tested. prepare: brings a new one into the state to be tested."""

    name: str
    config: Any
    prepare: Callable[[Router], None] = as_built

    @property
    def traits(self) -> Traits:
        """What it promises."""
        return self.config.traits

    @property
    def random(self) -> bool:
        """It draws random numbers in training."""
        return isinstance(self.config, NoisyTopK) or getattr(self.config, "jitter", 0.0) > 0

    def build(self, num_experts: int = E, dim: int = D, std: float = 0.5) -> Router:
        """The router in training mode, with logits that tell experts apart (a few start at zero)."""
        router = self.config.build(dim, num_experts)
        spread(router, std)
        self.prepare(router)
        return router

    def layer(self, **kwargs: Any) -> MoE:
        """The router in a layer of E experts, with the loss that it can't do without."""
        balance = (*kwargs.pop("balance", ()), *self.needed_losses())
        layer = MoE(D, 8, E, router=self.config, balance=balance, **kwargs)
        layer.init_weights(0.5, 0.5)
        spread(layer.router)
        self.prepare(layer.router)
        return layer

    def needed_losses(self) -> Iterator[Any]:
        """The loss of that name, with its default coefficient."""
        return (loss() for loss in LOSSES if loss().name == self.traits.needs_loss)


def spread(router: Router, std: float = 0.5) -> None:
    """Draw every parameter."""
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=std)


def _cases() -> Iterator[Case]:
    for cls in ROUTERS:
        yield Case(cls.__name__, cls())
        for name, variant in VARIANTS.get(cls, {}).items():
            config, prepare = variant if isinstance(variant, tuple) else (variant, as_built)
            yield Case(f"{cls.__name__}-{name}", config, prepare)


CASES = tuple(_cases())


def each(chosen: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """Parametrise a test over the cases that `chosen` holds for: there must be some."""
    cases = [case for case in CASES if chosen(case)]
    assert cases
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def batch(num_tokens: int = T) -> tuple[Tensor, Tensor]:
    """(x_TD, token_ids_T), random."""
    return torch.randn(num_tokens, D), torch.randint(VOCAB, (num_tokens,))


def route(router: Router, x: Tensor, ids: Tensor | None, bias: Tensor | None = None, seed: int = 1) -> RoutingDecision:
    """The decision, with the random numbers of this seed."""
    torch.manual_seed(seed)
    return router(x, bias, ids)


def dense(decision: RoutingDecision) -> tuple[Tensor, Tensor]:
    """(T, E) bool, who takes whom; (T, E) fp32, with which weight, 0 elsewhere."""
    at = (decision.token_ids_N, decision.expert_ids_N)
    taken = torch.zeros(decision.probs_TE.shape, dtype=torch.bool)
    taken[at] = True
    return taken, torch.zeros_like(decision.probs_TE).index_put(at, decision.weights_N).detach()


def assert_same_choice(actual: RoutingDecision, expected: RoutingDecision, rows: Any = slice(None)) -> None:
    """The same experts with the same weights, in whatever order; rows: of `expected` that `actual` is compared with."""
    (taken, weights), (expected_taken, expected_weights) = dense(actual), dense(expected)
    assert torch.equal(taken, expected_taken[rows])
    torch.testing.assert_close(weights, expected_weights[rows], rtol=1e-5, atol=1e-6)


def fields(decision: RoutingDecision) -> dict[str, Tensor]:
    """All tensors of a decision."""
    found = {name: value for name, value in vars(decision).items() if isinstance(value, Tensor)}
    if decision.preferences is not None:
        found |= {"ranking": decision.preferences.ranking_TE, "values": decision.preferences.values_TE}
    return found


def assert_same_bits(actual: RoutingDecision, expected: RoutingDecision) -> None:
    """Every tensor of the two decisions is equal."""
    ours, theirs = fields(actual), fields(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
