"""What each expert serves, drawn and in words: pure functions from records to ECharts options and to texts."""

from __future__ import annotations

import numpy as np

from equipoise.dashboard.charts import Options, lines, short_names
from equipoise.dashboard.palette import Palette
from equipoise.dashboard.records import Series
from equipoise.monitor.specialisation import LayerRoles, Saturation

MAX_LAYERS = 6  # with a curve of their own


def saturation_curves(found: Saturation) -> list[Series]:
    """A curve for each of at most 6 layers, evenly from the first to the last."""
    layers = list(found.overlap)
    chosen = [layers[i] for i in sorted(set(np.linspace(0, len(layers) - 1, MAX_LAYERS).round().astype(int).tolist()))]
    names = dict(zip(layers, short_names(layers), strict=True))
    return [Series(names[layer], tuple(zip(found.steps, found.overlap[layer], strict=True))) for layer in chosen]


def saturation_lines(found: Saturation, palette: Palette) -> Options:
    """The share of the last checkpoint's choices that each checkpoint already makes."""
    return lines(saturation_curves(found), palette, form="share", low=0.0, high=1.0)


def strongest(layer: LayerRoles, split: str) -> str:
    """The clearest pair of group and expert, in words."""
    lift_GE = layer.splits[split].lift_GE
    if np.isnan(lift_GE).all():
        return "too few tokens to tell"
    group, expert = np.unravel_index(np.nanargmax(lift_GE), lift_GE.shape)
    told = layer.splits[split].information
    return (
        f"most: {layer.splits[split].groups[group]} in expert {expert}, {lift_GE[group, expert]:.1f} times chance; "
        f"{told.nats:.3f} nats, by chance {told.control:.3f}, p {told.p_value:.3f}"
    )
