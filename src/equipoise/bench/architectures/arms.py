"""The architectures that are compared. A further one is one function and one line.

Each is built with a width of its feed-forward part, which is then fitted so that all have the same active FLOPs per
token as the baseline, counted. `dense, equal parameters` alone is not fitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from equipoise.bench.architectures.count import fitted, flops_per_token
from equipoise.layer import Peer, ZeroExperts
from equipoise.models.attention_experts.configs import MixtureOfAttention, MixtureOfHeads, SwitchHead
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.mamba import Mamba
from equipoise.routing import Hash, SwitchLoss, TopK, ZLoss

BASELINE = "MoE top-2"
BALANCE = (SwitchLoss(coef=0.02),)


@dataclass(frozen=True)
class Arm:
    """build: the base with this architecture and that width. width: to begin with. is_fitted: to the baseline's FLOPs.

    source: where it is described.
    """

    build: Callable[[DecoderConfig, int], DecoderConfig]
    width: int
    source: str
    is_fitted: bool = True

    def of(self, base: DecoderConfig) -> DecoderConfig:
        """The base with this architecture, at the baseline's active FLOPs."""
        if not self.is_fitted:
            return self.build(base, self.width)
        target = flops_per_token(ARMS[BASELINE].build(base, ARMS[BASELINE].width))
        return fitted(lambda width: self.build(base, width), target, self.width)


def _moe(num_experts: int, k: int, shared: int = 0) -> Callable[[DecoderConfig, int], DecoderConfig]:
    def build(base: DecoderConfig, width: int) -> DecoderConfig:
        router = TopK(k=k, renormalize=k > 1)
        moe = MoEConfig(
            num_experts=num_experts, hidden_dim=width, router=router, balance=BALANCE, shared_experts=shared
        )
        return replace(base, moe=moe)

    return build


def _dense(base: DecoderConfig, width: int) -> DecoderConfig:
    return replace(base, moe=None, hidden_dim=width)


def _hash(base: DecoderConfig, width: int) -> DecoderConfig:
    moe = MoEConfig(num_experts=8, hidden_dim=width, router=Hash(vocab_size=base.vocab_size, k=2))
    return replace(base, moe=moe)


def _with(**parts: Any) -> Callable[[DecoderConfig, int], DecoderConfig]:
    """The baseline's MoE, and other parts of the decoder."""

    def build(base: DecoderConfig, width: int) -> DecoderConfig:
        return replace(_moe(8, 2)(base, width), **parts)

    return build


def _peer(base: DecoderConfig, width: int) -> DecoderConfig:
    peer = Peer(num_experts=1024, heads=4, k=8, key_dim=16)
    return replace(base, moe=None, hidden_dim=width, peer=peer, peer_layers=tuple(range(1, base.num_layers, 2)))


def _zero(base: DecoderConfig, width: int) -> DecoderConfig:
    zero = ZeroExperts(zero=1, copy=1, constant=2, weight=0.75)
    moe = MoEConfig(num_experts=8, hidden_dim=width, router=TopK(k=2), balance=BALANCE, zero_experts=zero)
    return replace(base, moe=moe)


MOA = MixtureOfAttention(
    num_experts=8, router=TopK(k=4, renormalize="detached"), balance=(SwitchLoss(coef=0.01), ZLoss(coef=0.001))
)
MOH = MixtureOfHeads(shared_heads=2, router=TopK(k=4), balance=(SwitchLoss(coef=0.01),))

ARMS: dict[str, Arm] = {
    BASELINE: Arm(_moe(8, 2), 128, "arXiv 2401.04088"),
    "dense, equal FLOPs": Arm(_dense, 256, ""),
    "dense, equal parameters": Arm(_dense, 8 * 128, "", is_fitted=False),
    "MoE top-1": Arm(_moe(4, 1), 256, "arXiv 2101.03961"),
    "fine-grained, 32 experts, top-8": Arm(_moe(32, 8), 32, "arXiv 2401.06066"),
    "one routed, one shared": Arm(_moe(7, 1, shared=1), 128, "arXiv 2401.06066"),
    "hash, top-2": Arm(_hash, 128, "arXiv 2106.04426"),
    "zero-computation experts": Arm(_zero, 128, "arXiv 2410.07348"),
    "PEER in every second layer": Arm(_peer, 256, "arXiv 2407.04153"),
    "MoE-Mamba": Arm(_with(mamba=Mamba(expand=1)), 128, "arXiv 2401.04081"),
    "MoE, mixture of attention": Arm(_with(num_kv_heads=1, attention_moe=MOA), 128, "arXiv 2210.05144"),
    "MoE, SwitchHead": Arm(
        _with(num_heads=2, num_kv_heads=None, attention_moe=SwitchHead(num_experts=4, k=2)), 128, "arXiv 2312.07987"
    ),
    "MoE, mixture of heads": Arm(_with(num_heads=8, attention_moe=MOH), 128, "arXiv 2410.11842"),
}
