"""Charts as ECharts options: pure functions from records and a palette to plain dicts.

Names that come from a run are only ever values in them, never keys: NiceGUI runs the values of keys that begin with ":"
as JavaScript, and those are constants here, or cells packed as base64. Tooltips are rich text on the canvas, not HTML.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from equipoise.dashboard.palette import DEAD_LOAD, DEAD_SIGN, HEAT_SPAN, LIGHT, Palette, heat_value, heat_values
from equipoise.dashboard.records import Evenness, ExpertTimes, Frame, Series, Together
from equipoise.monitor.incidents import DONE, Incident
from equipoise.types import Action, RoutingStats

Options = dict[str, Any]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"  # canvas: no inherit
LABEL_PIXELS, MAP_PIXELS = 13, 400  # high: a label of a row, and the least that a map with many rows is
MARKS_NOTE = "— alert  - - repair  ··· undone repair"  # how lines on a map are drawn
NO_CELL = -32768  # as an int16: there is no such expert
NUMBERED_EXPERTS = 16  # so many experts have room for the number in the cell
DASHES = ("solid", "dashed", "dotted", [8, 3, 2, 3], "solid", "dashed")
FORMATS = {"number": "eqp.number", "share": "eqp.share"}


def heat_map(frame: Frame, palette: Palette) -> Options:
    """Load of every expert (across) in every layer (down) at one flush, relative to fair."""
    load_LE = np.full((len(frame.layers), frame.num_experts), np.nan)  # NaN where a layer has fewer experts
    for row, stats in enumerate(frame.layers):
        load_LE[row, : stats.num_experts] = stats.load_E
    names = short_names([stats.layer for stats in frame.layers])
    return _map_of_ratios(
        _numbers(frame.num_experts), names, _cells(load_LE, palette, _load_text), palette, "eqp.heatTip"
    )


def expert_history(history: Sequence[RoutingStats], palette: Palette, marks: Sequence[Incident] = ()) -> Options:
    """Load of every expert (down) of one layer over the steps (across), relative to fair."""
    num_experts = max((stats.num_experts for stats in history), default=0)
    load_ES = np.full((num_experts, len(history)), np.nan)
    for column, stats in enumerate(history):
        load_ES[: stats.num_experts, column] = stats.load_E
    steps = [stats.step for stats in history]
    data = _packed(heat_values(load_ES), 100)
    columns, rows = list(map(str, steps)), _numbers(num_experts)
    options = _map_of_ratios(columns, rows, data, palette, "eqp.historyTip", below="step")
    options["series"][0] |= _marks_on_steps(steps, marks, palette)
    return options


def evenness_map(even: Evenness, palette: Palette) -> Options:
    """Effective experts relative to E, of every layer (down) over the steps (across)."""
    data = _packed(even.share_LS, 1000)
    options = _map(list(map(str, even.steps)), short_names(even.layers), data, palette, "eqp.evenTip", "step")
    options["visualMap"] |= {"min": 0, "max": 1, "inRange": {"color": list(palette.unevenness)}}
    return options


def served_map(lift_GE: np.ndarray, groups: Sequence[str], palette: Palette) -> Options:
    """How much more often than chance each expert (across) serves each group of tokens (down)."""
    data = _cells(lift_GE, palette, "{:.1f}".format)
    return _map_of_ratios(_numbers(lift_GE.shape[1]), list(groups), data, palette, "eqp.servedTip")


def together_map(pairs: Together, palette: Palette) -> Options:
    """How often each two experts are chosen together, relative to chance."""
    names = list(map(str, pairs.experts))
    return _map_of_ratios(names, names, _packed(heat_values(pairs.lift_EE), 100), palette, "eqp.togetherTip")


def against_map(pairs: Together, palette: Palette) -> Options:
    """How often each two experts are chosen together in one run, relative to another."""
    options = together_map(pairs, palette)
    options["tooltip"][":formatter"] = "eqp.againstTip"
    return options


def lines(
    curves: Sequence[Series],
    palette: Palette,
    *,
    form: str = "number",
    low: float | None = None,
    high: float | None = None,
    marks: Sequence[Incident] = (),
) -> Options:
    """Curves over the steps. form: of the numbers, "number" or "share". low, high: ends of the axis."""
    series = [_line(curve, index, palette) for index, curve in enumerate(curves)]
    if high is None and form == "share" and not any(value for curve in curves for _, value in curve.points):
        high = 0.01  # an axis for zeros
    if series and marks:
        series[0] |= _marks_on_axis(marks, palette, _last_step(curves))
    label = {"color": palette.muted, "fontSize": 11}
    return {
        "animation": False,
        "textStyle": {"fontFamily": FONT},
        "aria": {"enabled": False},  # the element has a label of its own, with the numbers
        "grid": {"left": 8, "right": 16, "top": 30 if len(curves) > 1 else 12, "bottom": 6, "containLabel": True},
        "legend": _legend(palette) | {"show": len(curves) > 1},
        "tooltip": _tooltip(palette) | {"trigger": "axis", ":valueFormatter": FORMATS[form]},
        "xAxis": {
            "type": "value",
            "min": "dataMin",
            "max": "dataMax",
            "axisLabel": label | {"hideOverlap": True, "showMinLabel": False, "showMaxLabel": False},
            "axisLine": {"lineStyle": {"color": palette.line}},
            "splitLine": {"show": False},
            "minInterval": 1,
        },
        "yAxis": {
            "type": "value",
            "min": low,
            "max": high,
            "scale": low is None,
            "splitNumber": 4,
            "interval": high / 4 if high is not None and low == 0.0 else None,
            "axisLabel": label | {":formatter": FORMATS[form]},
            "splitLine": {"lineStyle": {"color": palette.line}},
        },
        "series": series,
    }


def expert_bars(times: ExpertTimes, palette: Palette) -> Options:
    """p50 and p99 of each expert (across), in milliseconds."""
    label = {"color": palette.muted, "fontSize": 11}
    groups = {"p50": (times.p50, palette.lines[0]), "p99": (times.p99, palette.lines[1])}
    return {
        "animation": False,
        "textStyle": {"fontFamily": FONT},
        "aria": {"enabled": False},
        "grid": {"left": 8, "right": 16, "top": 30, "bottom": 22, "containLabel": True},
        "legend": _legend(palette) | {"itemWidth": 12},
        "tooltip": _tooltip(palette) | {"trigger": "axis", ":valueFormatter": FORMATS["number"]},
        "xAxis": {
            "type": "category",
            "data": list(map(str, range(len(times.p99)))),
            "name": "expert",
            "nameLocation": "middle",
            "nameGap": 24,
            "nameTextStyle": {"color": palette.muted},
            "axisTick": {"show": False},
            "axisLine": {"lineStyle": {"color": palette.line}},
            "axisLabel": label,
        },
        "yAxis": {
            "type": "value",
            "min": 0.0,
            "splitNumber": 4,
            "axisLabel": label | {":formatter": FORMATS["number"]},
            "splitLine": {"lineStyle": {"color": palette.line}},
        },
        "series": [
            {"type": "bar", "name": name, "data": list(values), "barMaxWidth": 14, "itemStyle": {"color": colour}}
            for name, (values, colour) in groups.items()
        ],
    }


def nothing(palette: Palette) -> Options:
    """An empty chart."""
    return {"series": []}


def map_height(num_rows: int, largest: int, smallest: int) -> int:
    """Height of a map in pixels: rows get smaller, from largest to smallest, as there are more of them."""
    row = max(smallest, min(largest, 560 // max(1, num_rows)))
    return 44 + max(2, num_rows) * row


def short_names(names: Sequence[str]) -> list[str]:
    """Short layer names, without what all share: model.blocks.0.moe, model.blocks.1.moe -> blocks.0, blocks.1.

    Of the shared beginning the last part is kept, because a number alone says little.
    """
    parts = [name.split(".") for name in names]
    while len(names) > 1 and len({part[-1] for part in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [part[:-1] for part in parts]
    while len(names) > 1 and min(map(len, parts)) > 2 and len({tuple(part[:2]) for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    whole = [".".join(part) for part in parts]
    return [name if len(name) <= 18 else f"{name[:8]}…{name[-9:]}" for name in whole]


def points(history: Sequence[RoutingStats], name: str, values: Sequence[float]) -> Series:
    """A curve from the records of a layer and a number for each."""
    pairs = zip(history, values, strict=True)
    return Series(name, tuple((stats.step, value if math.isfinite(value) else None) for stats, value in pairs))


# ------------------------------------------------------------------------------------------------------- pieces


def _numbers(count: int) -> list[str]:
    return list(map(str, range(count)))


def _map_of_ratios(
    columns: list[str], rows: list[str], data: Options, palette: Palette, tip: str, below: str = "expert"
) -> Options:
    """A map whose cells are ratios to fair or to chance, as `heat_value` has them."""
    options = _map(columns, rows, data, palette, tip, below)
    options["visualMap"] |= {"min": -HEAT_SPAN, "max": HEAT_SPAN, "inRange": {"color": list(palette.heat)}}
    return options


def _map(columns: list[str], rows: list[str], data: Options, palette: Palette, tip: str, below: str) -> Options:
    """A map of cells. data: the series' key "data" or, packed, ":data". below: what the columns are."""
    label = {"color": palette.muted, "fontSize": 11}
    axis = {"type": "category", "axisTick": {"show": False}, "axisLine": {"show": False}, "splitArea": {"show": False}}
    interval = math.ceil(len(rows) * LABEL_PIXELS / MAP_PIXELS) - 1 if rows else 0
    return {
        "animation": False,
        "textStyle": {"fontFamily": FONT},
        "grid": {"left": 14 + 7 * max(map(len, rows), default=1), "right": 10, "top": 8, "bottom": 44},
        "tooltip": _tooltip(palette) | {"trigger": "item", ":formatter": tip},
        "visualMap": {"show": False, "dimension": 2, "type": "continuous"},
        "xAxis": axis
        | {"data": columns, "axisLabel": label, "nameTextStyle": {"color": palette.muted}}
        | {"name": below, "nameLocation": "middle", "nameGap": 24},
        "yAxis": axis | {"data": rows, "inverse": True, "axisLabel": label | {"interval": interval}},
        "series": [
            {
                "type": "heatmap",
                **data,
                "progressive": 0,
                "itemStyle": {
                    "borderColor": palette.surface,
                    "borderWidth": 1 if len(columns) <= 64 and len(rows) <= 32 else 0,
                },
                "emphasis": {"itemStyle": {"borderColor": palette.ink, "borderWidth": 2}},
            }
        ],
    }


def _packed(values_RC: np.ndarray, scale: int) -> Options:
    """The cells as base64 of int16, row by row, times `scale`: a tenth of the bytes, and quick to read in the browser.

    The value of ":data" is code: a call of ours with letters, digits and three signs in it.
    """
    whole = np.where(np.isfinite(values_RC), np.round(np.nan_to_num(values_RC) * scale), NO_CELL).astype("<i2")
    text = base64.b64encode(whole.tobytes()).decode()
    return {":data": f'eqp.cells("{text}",{values_RC.shape[1]},{scale})'}


def _cells(ratios_RE: np.ndarray, palette: Palette, text: Callable[[float], str]) -> Options:
    """Cells with their number in them where few experts leave room for it, else packed. NaN is no cell."""
    num_experts = ratios_RE.shape[1]
    if num_experts > NUMBERED_EXPERTS:
        return _packed(heat_values(ratios_RE), 100)
    values = {place: float(ratio) for place, ratio in np.ndenumerate(ratios_RE) if not math.isnan(ratio)}
    cells = [
        {"value": [expert, row, heat_value(ratio)], "label": _label(text(ratio), heat_value(ratio), palette)}
        for (row, expert), ratio in values.items()
    ]
    return {"data": cells, "label": {"show": True, "fontSize": 12 if num_experts <= 8 else 10}}


def _load_text(load: float) -> str:
    """A cross for the dead."""
    return DEAD_SIGN if load < DEAD_LOAD else f"{load:.1f}" if load < 9.95 else f"{load:.0f}"


def _label(text: str, value: float, palette: Palette) -> Options:
    """What stands in a cell. The ends of the ramp are dark in the light theme and bright in the other."""
    at_the_end = abs(value) > 0.6 * HEAT_SPAN
    colour = ("#ffffff" if palette is LIGHT else "#0d1015") if at_the_end else palette.ink
    return {"color": colour, "formatter": text}


def _legend(palette: Palette) -> Options:
    return {
        "type": "scroll",
        "left": 4,
        "top": 0,
        "itemWidth": 22,
        "itemHeight": 8,
        "textStyle": {"color": palette.ink, "fontSize": 12},
        "inactiveColor": palette.line,
        "pageTextStyle": {"color": palette.muted},
        "pageIconColor": palette.ink,
        "pageIconInactiveColor": palette.line,
    }


def _tooltip(palette: Palette) -> Options:
    return {
        "renderMode": "richText",
        "confine": True,
        "backgroundColor": palette.raised,
        "borderColor": palette.line,
        "textStyle": {"color": palette.ink, "fontSize": 12, "fontFamily": FONT},
        "axisPointer": {"lineStyle": {"color": palette.muted}, "label": {"show": False}},
    }


def _line(curve: Series, index: int, palette: Palette) -> Options:
    colour = palette.lines[index % len(palette.lines)]
    return {
        "type": "line",
        "name": curve.name[:60],
        "data": [[step, value] for step, value in curve.points],
        "showSymbol": len(curve.points) <= 12,
        "symbolSize": 6,
        "lineStyle": {"width": 1.8, "type": DASHES[index % len(DASHES)]},
        "itemStyle": {"color": colour},
        "connectNulls": False,
        "emphasis": {"disabled": True},
    }


def _last_step(curves: Sequence[Series]) -> int:
    return max((curve.points[-1][0] for curve in curves if curve.points), default=0)


def _marks_on_axis(marks: Sequence[Incident], palette: Palette, last: int) -> Options:
    """A tint while an alert lasts, a line at each repair that was made. The newest only: more cover the curves."""
    newest = marks[:20]
    colours = {"critical": palette.critical, "warning": palette.warning, "info": palette.muted}
    areas = [
        [
            {"xAxis": incident.since, "itemStyle": {"color": colours[incident.finding.severity], "opacity": 0.14}},
            {"xAxis": incident.lasted_until(last)},
        ]
        for incident in newest
    ]
    repairs = [{"xAxis": action.step, "lineStyle": _of_repair(action, palette)} for action in _done(newest)]
    return {
        "markArea": {"silent": True, "data": areas},
        "markLine": _mark_line(palette.good, repairs),
    }


def _marks_on_steps(steps: Sequence[int], marks: Sequence[Incident], palette: Palette) -> Options:
    if not steps:
        return {}
    alert: Options = {"color": palette.critical, "type": "solid"}
    drawn = [(incident.fired, alert) for incident in marks[:10]]
    drawn += [(action.step, _of_repair(action, palette)) for action in _done(marks[:10])]
    data = [
        {
            "xAxis": int(np.searchsorted(steps, step).clip(0, len(steps) - 1)),
            "lineStyle": {**style, "width": 2},
        }
        for step, style in drawn
    ]
    return {"markLine": _mark_line(palette.critical, data)}


def _done(marks: Sequence[Incident]) -> list[Action]:
    """The repairs that have changed the model, if only for a while."""
    return [action for incident in marks for action in incident.actions if action.state in DONE]


def _of_repair(action: Action, palette: Palette) -> Options:
    """How its line is drawn: dashed, and dotted when it was undone."""
    undone = action.state == "undone"
    return {"color": palette.warning if undone else palette.good, "type": [2, 3] if undone else [5, 3]}


def _mark_line(colour: str, data: Sequence[Options]) -> Options:
    return {
        "silent": True,
        "symbol": "none",
        "label": {"show": False},
        "animation": False,
        "lineStyle": {"color": colour, "width": 1.5, "type": [5, 3]},
        "data": list(data),
    }
