"""Routers, balancing losses, balancers and schedules: one idea per file, each strategy a frozen config.

The tables below list every strategy once: what a configuration file may name, and what the conformance suites test.
"""

from typing import Any

from equipoise.routing.balancers import BiasBalance, QuantileBalance
from equipoise.routing.coefficients import DropRateCoef, SparsityCoef
from equipoise.routing.expert_choice import ExpertChoice
from equipoise.routing.hash_router import Hash
from equipoise.routing.losses import ImportanceLoss, LoadLoss, SwitchLoss, ZLoss
from equipoise.routing.noisy_top_k import NoisyTopK
from equipoise.routing.relu import ReLURouting
from equipoise.routing.round_robin import RoundRobin
from equipoise.routing.schedules import Constant, CosineAnneal, HighThenLow, LinearAnneal
from equipoise.routing.similarity import SimilarityLoss
from equipoise.routing.sinkhorn import Sinkhorn
from equipoise.routing.sparsity import SparsityLoss
from equipoise.routing.switch import Switch
from equipoise.routing.threshold import Threshold
from equipoise.routing.top_k import TopK
from equipoise.routing.two_tier import TwoTier

ROUTERS: tuple[type[Any], ...] = (
    TopK,
    Switch,
    NoisyTopK,
    ExpertChoice,
    Threshold,
    Sinkhorn,
    Hash,
    TwoTier,
    RoundRobin,
    ReLURouting,
)
LOSSES: tuple[type[Any], ...] = (SwitchLoss, ImportanceLoss, LoadLoss, ZLoss, SimilarityLoss, SparsityLoss)
BALANCERS: tuple[type[Any], ...] = (BiasBalance, QuantileBalance)
COEFFICIENTS: tuple[type[Any], ...] = (Constant, LinearAnneal, CosineAnneal, HighThenLow, DropRateCoef, SparsityCoef)

__all__ = [
    "BALANCERS",
    "COEFFICIENTS",
    "LOSSES",
    "ROUTERS",
    "BiasBalance",
    "Constant",
    "CosineAnneal",
    "DropRateCoef",
    "ExpertChoice",
    "Hash",
    "HighThenLow",
    "ImportanceLoss",
    "LinearAnneal",
    "LoadLoss",
    "NoisyTopK",
    "QuantileBalance",
    "ReLURouting",
    "RoundRobin",
    "SimilarityLoss",
    "Sinkhorn",
    "SparsityCoef",
    "SparsityLoss",
    "Switch",
    "SwitchLoss",
    "Threshold",
    "TopK",
    "TwoTier",
    "ZLoss",
]
