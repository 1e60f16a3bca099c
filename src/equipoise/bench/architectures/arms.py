"""The architectures that are compared. A further one is one function and one line.

Each is built with a width of its feed-forward part, which is then fitted so that all have the same active FLOPs per
token as the baseline, counted. `dense, equal parameters` alone is not fitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from equipoise.bench.architectures.count import fitted, flops_per_token
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.routing import Hash, SwitchLoss, TopK

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


ARMS: dict[str, Arm] = {
    BASELINE: Arm(_moe(8, 2), 128, "arXiv 2401.04088"),
    "dense, equal FLOPs": Arm(_dense, 256, ""),
    "dense, equal parameters": Arm(_dense, 8 * 128, "", is_fitted=False),
    "MoE top-1": Arm(_moe(4, 1), 256, "arXiv 2101.03961"),
    "fine-grained, 32 experts, top-8": Arm(_moe(32, 8), 32, "arXiv 2401.06066"),
    "one routed, one shared": Arm(_moe(7, 1, shared=1), 128, "arXiv 2401.06066"),
    "hash, top-2": Arm(_hash, 128, "arXiv 2106.04426"),
}
