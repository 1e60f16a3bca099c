"""equipoise: Mixture-of-Experts models with the router kept in balance.

The public names are imported when they are first asked for: `import equipoise` alone loads neither torch nor NumPy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {  # public name: the module that it is in
    "BatchScope": "equipoise.types",
    "BiasBalance": "equipoise.routing",
    "Capacity": "equipoise.layer",
    "Decoder": "equipoise.models.decoder",
    "DecoderConfig": "equipoise.models.config",
    "ExpertChoice": "equipoise.routing",
    "Hash": "equipoise.routing",
    "ImportanceLoss": "equipoise.routing",
    "KnownGood": "equipoise.recovery.known_good",
    "Ladder": "equipoise.recovery.policy",
    "LoadLoss": "equipoise.routing",
    "MoE": "equipoise.layer",
    "MoEConfig": "equipoise.models.config",
    "NoisyTopK": "equipoise.routing",
    "Policy": "equipoise.recovery.policy",
    "QuantileBalance": "equipoise.routing",
    "ReLURouting": "equipoise.routing",
    "RoundRobin": "equipoise.routing",
    "RoundRobinThenReload": "equipoise.recovery.policy",
    "RoutingDecision": "equipoise.types",
    "RoutingStats": "equipoise.types",
    "SimilarityLoss": "equipoise.routing",
    "Sinkhorn": "equipoise.routing",
    "SparsityLoss": "equipoise.routing",
    "Switch": "equipoise.routing",
    "SwitchLoss": "equipoise.routing",
    "Threshold": "equipoise.routing",
    "TopK": "equipoise.routing",
    "TwoTier": "equipoise.routing",
    "Watch": "equipoise.monitor.watch",
    "ZLoss": "equipoise.routing",
    "recover": "equipoise.recovery.recover",
    "watch": "equipoise.monitor.watch",
}

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


def __getattr__(name: str) -> Any:
    """A public name, on its first use; from then on it is an attribute like any other."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
