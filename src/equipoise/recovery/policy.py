"""Which repair an alert calls for. Pure: it proposes, `actions` applies."""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.types import Action, Alert


@dataclass(frozen=True)
class QuantileOnCollapse:
    """The gentlest rung: when a layer's router has collapsed, switch on its quantile balancer.

    The experts stay as they are and the router keeps its preferences; only the selection is rebalanced.
    """

    def __call__(self, alert: Alert) -> Action | None:
        """The action for an alert that has just fired, or None."""
        if alert.state != "firing" or alert.finding.rule != "collapse":
            return None
        return Action(kind="quantile_bias", layer=alert.finding.layer, step=alert.step, reason=alert.key)
