"""One picture of the comparison: what an architecture loses or gains in loss, and what it costs."""

from __future__ import annotations

from pathlib import Path

from equipoise.bench.architectures.arms import BASELINE
from equipoise.bench.architectures.compare import Found
from equipoise.host.extras import require
from equipoise.train.sweep_report import paired_difference

_INK, _ACCENT = "#22313f", "#1b6ca8"


def plot(found: Found, batches: tuple[int, ...], path: Path) -> Path:
    """Three panels, an architecture per line. Raises DataError where matplotlib is missing."""
    size = (12.0, 0.5 * len(found.losses) + 1.8)
    figure = require("matplotlib.figure", "plot").Figure(figsize=size, dpi=150, layout="constrained")
    require("matplotlib.backends.backend_agg", "plot").FigureCanvasAgg(figure)
    names = list(found.losses)[::-1]
    loss, train, decode = figure.subplots(1, 3, sharey=True)
    loss.set_yticks(range(len(names)), names)
    for place, name in enumerate(names):
        difference = paired_difference(found.losses[name], found.losses[BASELINE])
        loss.plot([difference.mean], [place], "o", color=_ACCENT)
        if name != BASELINE and len(found.losses[name]) > 1:
            loss.plot([difference.low, difference.high], [place, place], "-", color=_ACCENT)
        for mine, theirs in zip(found.losses[name], found.losses[BASELINE], strict=True):
            loss.plot([mine - theirs], [place], ".", color=_INK, alpha=0.5)
        train.plot([found.train_ratio[name]], [place], "o", color=_ACCENT)
        for batch, shade in zip(batches, (1.0, 0.75, 0.5, 0.35, 0.25, 0.2), strict=False):
            at = batches.index(batch)
            rate = found.decode_rate[name][at] / found.decode_rate[BASELINE][at]
            label = f"{batch} at once" if place == 0 else None
            decode.plot([rate], [place], "o", color=_ACCENT, alpha=shade, label=label)
    for axes, value, title in (
        (loss, 0.0, f"loss - {BASELINE} [nats]"),
        (train, 1.0, f"training step / {BASELINE}"),
        (decode, 1.0, f"decoded tokens/s / {BASELINE}"),
    ):
        axes.axvline(value, color=_INK, linewidth=0.8)
        axes.set_xlabel(title)
        axes.grid(axis="y", alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    decode.legend(frameon=False, fontsize=8)
    figure.savefig(path, format="png")
    return path
