"""Apply a proposed repair to a live model."""

from __future__ import annotations

from collections.abc import Mapping

from equipoise.layer import MoE
from equipoise.routing.balancers import QuantileBalancer
from equipoise.types import Action


def apply_action(action: Action, layers: Mapping[str, MoE]) -> None:
    """Carry out the action on the layer that it names.

    "quantile_bias": the layer's quantile balancer starts to set its selection bias at the next update.
    Raises ValueError for an unknown action or layer, and for a layer that was not built for it.
    """
    if action.kind != "quantile_bias":
        raise ValueError(f"action: expected quantile_bias, got {action.kind!r}")
    if action.layer not in layers:
        raise ValueError(f"action: expected a layer of {', '.join(layers)}, got {action.layer!r}")
    balancer = layers[action.layer].balancer
    if not isinstance(balancer, QuantileBalancer):
        raise ValueError(
            f"action: quantile_bias needs a QuantileBalance in {action.layer}, it has {type(balancer).__name__}; build "
            "the layer with balance=(..., QuantileBalance(on_demand=True))"
        )
    balancer.activate()
