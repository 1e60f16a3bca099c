"""equipoise: Mixture-of-Experts models with the router kept in balance."""

from equipoise.layer import Capacity, MoE
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.monitor.watch import Watch, watch
from equipoise.recovery.known_good import KnownGood
from equipoise.recovery.policy import Ladder, Policy, RoundRobinThenReload
from equipoise.recovery.recover import recover
from equipoise.routing import (
    BiasBalance,
    ExpertChoice,
    Hash,
    ImportanceLoss,
    LoadLoss,
    NoisyTopK,
    QuantileBalance,
    ReLURouting,
    RoundRobin,
    SimilarityLoss,
    Sinkhorn,
    SparsityLoss,
    Switch,
    SwitchLoss,
    Threshold,
    TopK,
    TwoTier,
    ZLoss,
)
from equipoise.types import BatchScope, RoutingDecision, RoutingStats

__version__ = "0.1.0"

__all__ = [
    "BatchScope",
    "BiasBalance",
    "Capacity",
    "Decoder",
    "DecoderConfig",
    "ExpertChoice",
    "Hash",
    "ImportanceLoss",
    "KnownGood",
    "Ladder",
    "LoadLoss",
    "MoE",
    "MoEConfig",
    "NoisyTopK",
    "Policy",
    "QuantileBalance",
    "ReLURouting",
    "RoundRobin",
    "RoundRobinThenReload",
    "RoutingDecision",
    "RoutingStats",
    "SimilarityLoss",
    "Sinkhorn",
    "SparsityLoss",
    "Switch",
    "SwitchLoss",
    "Threshold",
    "TopK",
    "TwoTier",
    "Watch",
    "ZLoss",
    "recover",
    "watch",
]
