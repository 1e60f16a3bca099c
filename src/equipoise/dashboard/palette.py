"""The colours of the pages, light and dark, and how a load becomes one.

Blue for cold and orange for hot differ in hue and, against the middle, in lightness, so that people who confuse red and
green can tell them apart. Contrast with the background: text at least 4.5 : 1, lines and marks at least 3 : 1.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

HEAT_SPAN = 2.0  # colours end at a quarter of the fair load and at four times it: 2 doublings either way
SMALLEST_LOAD = 2.0**-6  # below, the logarithm of a load is cut off
DEAD_LOAD = 0.1  # of fair: marked with a cross
DEAD_SIGN = "\u00d7"
DEAD_NOTE = f"{DEAD_SIGN} below a tenth of fair"


@dataclass(frozen=True)
class Palette:
    """One theme. Names say what a colour is for. heat: cold, fair, hot. unevenness: from one expert for all to even.

    lines: for curves side by side, told apart by dashes too.
    """

    page: str
    surface: str
    raised: str
    ink: str
    muted: str
    line: str
    accent: str
    good: str
    warning: str
    critical: str
    heat: tuple[str, ...]
    unevenness: tuple[str, ...]
    lines: tuple[str, ...]


LIGHT = Palette(
    page="#f4f5f7",
    surface="#ffffff",
    raised="#eef0f3",
    ink="#12161c",
    muted="#56606d",
    line="#d8dde3",
    accent="#0b5cc4",
    good="#0c6e58",
    warning="#8f5200",
    critical="#b3261e",
    heat=("#0a3a86", "#2a6cc0", "#74aade", "#bcd6ee", "#f0eeea", "#fad0a8", "#f0954e", "#c9590f", "#853000"),
    unevenness=("#5c0a4e", "#a33a86", "#d88abb", "#f0d2e5", "#f4f2ef"),
    lines=("#0b5cc4", "#b84e00", "#0c6e58", "#8a2f9e", "#56606d", "#a4161a"),
)
DARK = Palette(
    page="#0d1015",
    surface="#151a21",
    raised="#1e252e",
    ink="#e9edf2",
    muted="#9ba7b5",
    line="#2b333e",
    accent="#74b4ff",
    good="#4fd1b0",
    warning="#f0b64a",
    critical="#ff8078",
    heat=("#a6dbff", "#58adf5", "#2f76bd", "#234a70", "#272d36", "#5e3e22", "#ab6320", "#ee9136", "#ffcf94"),
    unevenness=("#ffb8e4", "#dd62a8", "#93386f", "#4c2a42", "#272d36"),
    lines=("#74b4ff", "#ffa057", "#4fd1b0", "#d79bf0", "#9ba7b5", "#ff8078"),
)
THEMES = {"light": LIGHT, "dark": DARK}


def css() -> str:
    """Both themes as CSS variables, and the legend's ramp."""
    return "\n".join(f":root[data-theme={name}] {{ {_variables(name, theme)} }}" for name, theme in THEMES.items())


def heat_value(load: float) -> float:
    """log2 of a load relative to fair, cut off at 1/64: what the heat maps colour."""
    return round(math.log2(max(load, SMALLEST_LOAD)), 2)


def heat_values(load: np.ndarray) -> np.ndarray:
    """The same for an array, to be rounded later; NaN stays NaN."""
    return np.asarray(np.log2(np.maximum(load, SMALLEST_LOAD)))


def _variables(name: str, theme: Palette) -> str:
    plain = {key: value for key, value in asdict(theme).items() if isinstance(value, str)}
    ramps = {key: f"linear-gradient(90deg, {', '.join(getattr(theme, key))})" for key in ("heat", "unevenness")}
    lines = {f"line-{i}": colour for i, colour in enumerate(theme.lines)}
    pairs = "; ".join(f"--{key}: {value}" for key, value in (plain | ramps | lines).items())
    return f"color-scheme: {name}; {pairs}"
