"""Routers, balancing losses, balancers and schedules: one idea per file, each strategy a frozen config with `build`."""

from equipoise.routing.balancers import BiasBalance, QuantileBalance
from equipoise.routing.losses import ImportanceLoss, LoadLoss, SwitchLoss, ZLoss
from equipoise.routing.schedules import Constant, CosineAnneal, HighThenLow, LinearAnneal
from equipoise.routing.switch import Switch
from equipoise.routing.top_k import TopK

__all__ = [
    "BiasBalance",
    "Constant",
    "CosineAnneal",
    "HighThenLow",
    "ImportanceLoss",
    "LinearAnneal",
    "LoadLoss",
    "QuantileBalance",
    "Switch",
    "SwitchLoss",
    "TopK",
    "ZLoss",
]
