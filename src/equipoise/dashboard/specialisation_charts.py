"""Charts of what each expert serves, as ECharts options: pure functions from records and a palette to plain dicts."""

from __future__ import annotations

import math

import numpy as np

from equipoise.dashboard.charts import NUMBERED_EXPERTS, Options, cell_label, lines, short_names, value_map
from equipoise.dashboard.palette import HEAT_SPAN, Palette, heat_value
from equipoise.dashboard.records import Series
from equipoise.monitor.specialisation import LayerRoles, Saturation, Split

MAX_LAYERS = 6  # with a curve of their own


def lift_map(found: Split, palette: Palette) -> Options:
    """How much more often than chance each expert (across) serves each group (down)."""
    options = value_map(found.lift_GE, found.groups, palette, "eqp.servedTip")
    num_experts = found.lift_GE.shape[1]
    if num_experts <= NUMBERED_EXPERTS:
        options["series"][0].pop(":data", None)
        options["series"][0]["data"] = numbered(found.lift_GE, palette)
        options["series"][0]["label"] = {"show": True, "fontSize": 12 if num_experts <= 8 else 10}
    return options


def numbered(lift_GE: np.ndarray, palette: Palette) -> list[Options]:
    """Cells with their number in them; none where there are too few tokens to tell."""
    return [
        {"value": [expert, group, value], "label": cell_label(f"{lift:.1f}", abs(value) > 0.6 * HEAT_SPAN, palette)}
        for (group, expert), lift in np.ndenumerate(lift_GE)
        if not math.isnan(lift) and (value := heat_value(float(lift))) is not None
    ]


def saturation_curves(found: Saturation) -> list[Series]:
    """A curve for each layer, of at most 6 layers evenly from the first to the last, and chance for the first."""
    layers = list(found.overlap)
    chosen = [layers[i] for i in sorted(set(np.linspace(0, len(layers) - 1, MAX_LAYERS).round().astype(int).tolist()))]
    names = dict(zip(layers, short_names(layers), strict=True))
    return [Series(names[layer], tuple(zip(found.steps, found.overlap[layer], strict=True))) for layer in chosen]


def saturation_lines(found: Saturation, palette: Palette) -> Options:
    """The share of the last checkpoint's choices that each checkpoint already makes."""
    return lines(saturation_curves(found), palette, form="share", low=0.0, high=1.0)


def strongest(layer: LayerRoles, split: str) -> str:
    """The clearest pair of group and expert, in words; "" where there are too few tokens."""
    lift_GE = layer.splits[split].lift_GE
    if np.isnan(lift_GE).all():
        return "too few tokens to tell"
    group, expert = np.unravel_index(np.nanargmax(lift_GE), lift_GE.shape)
    told = layer.splits[split].information
    return (
        f"most: {layer.splits[split].groups[group]} in expert {expert}, {lift_GE[group, expert]:.1f} times chance; "
        f"{told.nats:.3f} nats, by chance {told.control:.3f}, p {told.p_value:.3f}"
    )
