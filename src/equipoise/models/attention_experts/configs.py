"""What can be chosen of attention experts, and what fits together. No tensors; the modules are beside this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from equipoise.layer.choice import check_choice
from equipoise.models.attention_experts.head_gates import HeadGates
from equipoise.routing.balancers import BalancerConfig
from equipoise.routing.losses import BalanceLoss, LoadLoss
from equipoise.routing.router import RouterConfig, check_k
from equipoise.routing.top_k import TopK

if TYPE_CHECKING:
    from equipoise.models.config import DecoderConfig

Balance = tuple[BalanceLoss | BalancerConfig, ...]


@dataclass(frozen=True, kw_only=True)
class MixtureOfAttention:
    """Experts of queries and outputs over keys and values that all share (MoA, arXiv 2210.05144 section 3).

    num_experts: E. Each has a query and an output projection of kv_heads heads, one for each key/value head; with
    num_kv_heads=1 an expert is one head, as in the paper. router: K experts per token; DecoderConfig.num_heads is
    K * num_kv_heads, the query heads that a token uses. balance: the paper's are SwitchLoss and ZLoss.
    """

    num_experts: int
    router: RouterConfig = TopK(k=2, renormalize="detached")  # noqa: RUF009 - frozen
    balance: Balance = ()

    def check(self, config: DecoderConfig) -> None:
        """Raise ValueError when it does not fit the decoder."""
        check_plain("MixtureOfAttention", config)
        check_k("MixtureOfAttention.router", self.router.k, self.num_experts)
        check_choice(self.router, self.balance)
        if config.num_heads != self.router.k * config.kv_heads:
            raise ValueError(
                f"num_heads: expected router.k * num_kv_heads = {self.router.k * config.kv_heads} with "
                f"MixtureOfAttention, got {config.num_heads}. Set num_heads to that, or num_kv_heads=1 for experts of "
                "one head."
            )


@dataclass(frozen=True, kw_only=True)
class SwitchHead:
    """Value and output projections as mixtures, with sigmoid gates (SwitchHead, arXiv 2312.07987 section 2.2).

    num_experts: E, of each head and side. k: of them per token. Values are chosen at the source token, outputs at the
    destination, by routers of their own. balance: of either side; the paper has none.
    """

    num_experts: int
    k: int = 2
    balance: Balance = ()

    def router(self, num_heads: int) -> HeadGates:
        """The router of one side."""
        return HeadGates(num_heads, self.k)

    def check(self, config: DecoderConfig) -> None:
        """Raise ValueError when it does not fit the decoder."""
        check_plain("SwitchHead", config)
        check_k("SwitchHead", self.k, self.num_experts)
        check_choice(self.router(config.num_heads), self.balance)
        if config.kv_heads != config.num_heads:
            raise ValueError(
                f"num_kv_heads: expected None with SwitchHead, got {config.num_kv_heads}. Each head mixes its own "
                "values; take fewer heads instead."
            )
        if any(isinstance(loss, LoadLoss) for loss in self.balance):
            raise ValueError(
                "balance: expected no LoadLoss with SwitchHead, got one. It compares experts with all others, "
                "and here each head chooses among its own: use SwitchLoss."
            )


@dataclass(frozen=True, kw_only=True)
class MixtureOfHeads:
    """Multi-head attention whose heads are experts (MoH, arXiv 2410.11842 section 3).

    shared_heads: the first so many are always on. router: K of the other heads per token. balance: of these.
    """

    shared_heads: int
    router: RouterConfig = TopK(k=2)  # noqa: RUF009 - frozen
    balance: Balance = ()

    def num_routed(self, config: DecoderConfig) -> int:
        """Heads that are chosen from."""
        return config.num_heads - self.shared_heads

    def check(self, config: DecoderConfig) -> None:
        """Raise ValueError when it does not fit the decoder."""
        if config.latent is not None:
            raise ValueError(
                "attention_moe: expected None with latent attention, got MixtureOfHeads. Drop one of them."
            )
        if not 0 <= self.shared_heads < config.num_heads:
            raise ValueError(
                f"MixtureOfHeads.shared_heads: expected 0 to num_heads - 1 = {config.num_heads - 1}, got "
                f"{self.shared_heads}. At least one head is chosen by the router."
            )
        check_k("MixtureOfHeads.router", self.router.k, self.num_routed(config))
        check_choice(self.router, self.balance)


AttentionMoE = MixtureOfAttention | SwitchHead | MixtureOfHeads
ATTENTION_MOES = (MixtureOfAttention, SwitchHead, MixtureOfHeads)


def check_plain(name: str, config: DecoderConfig) -> None:
    """Refuse kinds of attention that MoA and SwitchHead have no place for."""
    bad = {
        "latent": config.latent is not None,
        "sinks": config.sinks,
        "attention_bias": config.attention_bias != "none",
        'qk_norm="whole"': config.qk_norm == "whole",
    }
    if any(bad.values()):
        found = ", ".join(each for each, is_set in bad.items() if is_set)
        raise ValueError(f"attention_moe: {name} expects none of {', '.join(bad)}, got {found}. Use MixtureOfHeads.")
