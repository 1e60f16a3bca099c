"""equipoise: Mixture-of-Experts models with the router kept in balance."""

from equipoise.layer import Capacity, MoE
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.monitor.watch import Watch, watch
from equipoise.routing import (
    BiasBalance,
    ImportanceLoss,
    LoadLoss,
    QuantileBalance,
    Switch,
    SwitchLoss,
    TopK,
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
    "ImportanceLoss",
    "LoadLoss",
    "MoE",
    "MoEConfig",
    "QuantileBalance",
    "RoutingDecision",
    "RoutingStats",
    "Switch",
    "SwitchLoss",
    "TopK",
    "Watch",
    "ZLoss",
    "watch",
]
