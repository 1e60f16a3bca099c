"""Pictures of what each expert serves: heat maps of the groups, token clouds, saturation over the checkpoints.

Reads a `Roles`, writes PNGs. Needs matplotlib (`equipoise[plot]`), without its global state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.monitor.plot import INK, matplotlib_parts
from equipoise.monitor.specialisation import DOMAIN, POSITION, TOKEN_CLASS, LayerRoles, Roles, Served

# Blue is less than chance, orange more: the colours and ends of the dashboard's maps.
COLD_TO_HOT = ("#0a3a86", "#2a6cc0", "#74aade", "#bcd6ee", "#f0eeea", "#fad0a8", "#f0954e", "#c9590f", "#853000")
SPAN = 2.0  # log2 of lift at the ends
MAX_LAYERS, MAX_CLOUDS, MAX_EXPERTS = 6, 3, 16
NUMBERED = 24  # so many experts have room for the number in the cell
LINES = ("#0b5cc4", "#b84e00", "#0c6e58", "#8a2f9e", "#56606d", "#a4161a")
MUTED, BLANK = "#56606d", "#ffffff"
CARD_WIDTH, CARD_HEIGHT, DPI = 2.9, 1.35, 150  # inches of one expert's cloud
LETTER = 0.602  # width of a letter of DejaVu Sans Mono, in heights
LARGEST, SMALLEST = 17.0, 8.0  # points


def draw_maps(roles: Roles, path: Path) -> Path:
    """Experts (across) against domains, token classes and positions (down), a row of maps per layer."""
    shown = spread(roles.layers, MAX_LAYERS)
    kinds = [kind for kind in (DOMAIN, TOKEN_CLASS, POSITION) if any(kind in layer.splits for layer in shown)]
    figure = _figure(5.2 * len(kinds), 0.9 + 2.7 * len(shown))
    axes_LK = figure.subplots(len(shown), len(kinds), squeeze=False)
    image = None
    for axes_K, layer in zip(axes_LK, shown, strict=True):
        for axes, kind in zip(axes_K, kinds, strict=True):
            image = _draw_map(axes, layer, kind) or image
    for axes, layer in zip(axes_LK[:, 0], shown, strict=True):
        axes.set_ylabel(short(layer.layer), fontsize=10, color=INK)
    if image is not None:
        bar = figure.colorbar(image, ax=axes_LK, fraction=0.015, pad=0.01, ticks=[-2, -1, 0, 1, 2])
        bar.ax.set_yticklabels(["¼ or less", "½", "chance", "2", "4 or more"], fontsize=9)
        bar.outline.set_visible(False)
    left_out = len(roles.layers) - len(shown)
    more = f"; {left_out} layers in between are left out" if left_out else ""
    figure.suptitle(
        f"How much more often than chance an expert serves a group; step {roles.step}, {roles.num_tokens:,} tokens, "
        f"{roles.text}{more}",
        fontsize=11, color=INK, ha="left", x=0.01,
    )  # fmt: skip
    figure.savefig(path, format="png")
    return path


def draw_cloud(layer: LayerRoles, path: Path) -> Path:
    """The tokens that each expert serves beyond chance: larger is more often, orange most of the word."""
    experts = busiest(layer, MAX_EXPERTS)
    columns = min(4, len(experts))
    rows = -(-len(experts) // columns)
    figure = _figure(CARD_WIDTH * columns, 0.5 + CARD_HEIGHT * rows)
    figure.suptitle(
        f"{layer.layer}: tokens that an expert serves beyond chance; orange: most of their occurrences"
        + ("" if len(experts) == layer.num_experts else f"; the {len(experts)} busiest of {layer.num_experts} experts"),
        fontsize=11, color=INK, ha="left", x=0.01,
    )  # fmt: skip
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, expert in zip(figure.axes, experts, strict=False):
        _draw_card(axes, layer, expert)
    figure.savefig(path, format="png")
    return path


def draw_saturation(roles: Roles, path: Path) -> Path:
    """Share of the last checkpoint's choices that each checkpoint makes, a curve per layer; dashed: by chance."""
    figure = _figure(8.0, 4.2)
    axes = figure.subplots()
    found = roles.saturation
    names = list(found.overlap)
    for index, name in enumerate(names):
        colour = LINES[index % len(LINES)]
        axes.plot(found.steps, found.overlap[name], color=colour, marker="o", markersize=4, label=short(name))
        axes.plot(found.steps, found.chance[name], color=colour, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xticks(found.steps)
    axes.set_xlabel("step of the checkpoint")
    axes.set_ylabel(f"of the choices at step {roles.step}")
    axes.set_title("Router saturation: what is already as it ends; dashed: chance", loc="left", fontsize=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.legend(frameon=False, fontsize=9, ncols=-(-len(names) // 12), bbox_to_anchor=(1.0, 1.0), loc="upper left")
    figure.savefig(path, format="png")
    return path


# ---------------------------------------------------------------------------------------------------------- pieces


def spread(layers: Sequence[LayerRoles], most: int) -> list[LayerRoles]:
    """At most so many layers, evenly from the first to the last."""
    if len(layers) <= most:
        return list(layers)
    return [layers[index] for index in np.linspace(0, len(layers) - 1, most).round().astype(int)]


def busiest(layer: LayerRoles, most: int) -> list[int]:
    """The experts with the most tokens, at most so many, in their order."""
    order = np.argsort(-np.array(layer.load), kind="stable")[:most]
    return sorted(order.tolist())


def short(name: str) -> str:
    """A layer's name without what says nothing: blocks.3.moe is blocks.3."""
    parts = name.split(".")
    return ".".join(parts[:-1]) if len(parts) > 2 else name


def _figure(width: float, height: float) -> Any:
    figure_type, canvas_type = matplotlib_parts()
    figure = figure_type(figsize=(width, height), dpi=DPI, layout="constrained")
    canvas_type(figure)
    return figure


def _draw_map(axes: Any, layer: LayerRoles, kind: str) -> Any:
    """One map; None, and no axes, where the layer has no such split."""
    from matplotlib.colors import LinearSegmentedColormap

    found = layer.splits.get(kind)
    if found is None:
        axes.set_axis_off()
        return None
    colours = LinearSegmentedColormap.from_list("heat", COLD_TO_HOT).with_extremes(bad=BLANK)
    lift_GE = found.lift_GE
    image = axes.imshow(
        np.log2(np.maximum(lift_GE, 2.0**-6)), cmap=colours, vmin=-SPAN, vmax=SPAN, aspect="auto", interpolation="none"
    )
    axes.set_yticks(range(len(found.groups)), found.groups, fontsize=8)
    every = max(1, layer.num_experts // 16)
    axes.set_xticks(range(0, layer.num_experts, every), range(0, layer.num_experts, every), fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    told = found.information
    axes.set_title(
        f"{kind}: {told.nats:.3f} nats, chance {told.control:.3f}, p {told.p_value:.3f}",
        loc="left", fontsize=9, color=MUTED,
    )  # fmt: skip
    if layer.num_experts <= NUMBERED:
        for (group, expert), lift in np.ndenumerate(lift_GE):
            if not np.isnan(lift):
                strong = abs(np.log2(max(lift, 2.0**-6))) > 0.6 * SPAN
                axes.text(expert, group, f"{lift:.1f}", ha="center", va="center", fontsize=6.5,
                          color="#ffffff" if strong else INK)  # fmt: skip
    return image


def _draw_card(axes: Any, layer: LayerRoles, expert: int) -> None:
    """One expert: its number, load and best group, and its tokens in lines."""
    axes.set(xlim=(0, 1), ylim=(0, 1))
    best = layer.best_group(DOMAIN, expert) or layer.best_group(TOKEN_CLASS, expert)
    load = layer.load[expert] / max(layer.num_tokens, 1)
    role = f", {best[0]} {best[1]:.1f}x" if best else ""
    axes.set_title(f"expert {expert}: {load:.0%} of tokens{role}", loc="left", fontsize=8.5, color=INK, weight="bold")
    tokens = layer.tokens[expert]
    if not tokens:
        axes.text(0, 0.85, "none beyond chance", fontsize=9, color=MUTED, style="italic")
    for token, x, y, size in flow(tokens, 72 * (CARD_WIDTH - 0.2), 72 * (CARD_HEIGHT - 0.38)):
        axes.text(
            x / (72 * (CARD_WIDTH - 0.2)), 1 - y / (72 * (CARD_HEIGHT - 0.38)), printed(token), fontsize=size,
            family="DejaVu Sans Mono", color=_colour(token), va="top", parse_math=False,
        )  # fmt: skip


def flow(tokens: Sequence[Served], width: float, height: float) -> Iterator[tuple[Served, float, float, float]]:
    """(token, x, y, size) in points from the upper left: words in lines, as many as fit. Size goes with occurrences."""
    most = max((np.sqrt(token.served) for token in tokens), default=1.0)
    x = y = line = 0.0
    for token in tokens:
        size = max(SMALLEST, LARGEST * float(np.sqrt(token.served) / most))
        needs = LETTER * size * len(printed(token))
        if x and x + needs > width:
            x, y, line = 0.0, y + line, 0.0
        if y + 1.25 * size > height:
            return
        yield token, x, y, size
        x, line = x + needs + 7.0, max(line, 1.25 * size)


def printed(token: Served) -> str:
    """The token with its leading space as a sign that can be seen, at most 14 letters."""
    text = token.text.replace(" ", "·")
    return text if len(text) <= 14 else text[:13] + "…"


def _colour(word: Served) -> str:
    """Grey, black, orange, deep orange: below a quarter, a half, nine tenths of its occurrences, and above."""
    share = word.served / max(word.occurs, 1)
    return ("#7d8794", "#222222", "#c9590f", "#853000")[sum(share >= limit for limit in (0.25, 0.5, 0.9))]
