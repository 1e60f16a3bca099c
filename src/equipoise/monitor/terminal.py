"""The terminal's view of a run: header, loss, heat map of the experts' load, alerts, repairs.

Everything shown comes from the run store, so training and `equipoise watch` show the same. It judges nothing itself.
Made to be readable without colours: loads are numbers or block heights, colour only repeats them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from equipoise.monitor.incidents import all_numbers, repairs, state_text, target
from equipoise.monitor.store import RunStore
from equipoise.types import Action, Alert, RoutingStats

BLOCKS = "▁▂▃▄▅▆▇█"
DEAD_CELL = "·"
NUMBER_CELL = 4  # columns of a cell that holds a number such as "1.3", and a space
STATISTICS_WIDTH = 39  # columns of the table beside the heat map, without the layer's name
ENTROPY_WIDTH = 9  # the entropy says in other words what the effective experts say: left out where space is short
NARROW = 100
MAX_LAYERS = 24  # beyond, only the most uneven layers are shown
MAX_CELLS = 64
MAX_FIRING = 4  # alerts shown in full
RECENT = 4  # resolved alerts and repairs shown
STATE_STYLES = {"proposed": "dim", "applied": "cyan", "kept": "green", "undone": "yellow", "failed": "red"}
SPEEDS = {  # words -> (a server's scalar, how it is written)
    "requests/s": ("requests_per_s", ".1f"),
    "running": ("running", ".0f"),
    "waiting": ("queue_depth", ".0f"),
    "first token p99 ms": ("time_to_first_token_ms.p99", ".0f"),
    "next p99 ms": ("inter_token_ms.p99", ".0f"),
}
RATE_STEPS = 50  # the time left is extrapolated from so many recorded steps


@dataclass(frozen=True)
class RunView:
    """What the terminal shows of a run, at one moment. None for what the run has not recorded.

    losses: training losses by step, oldest first; of a server, tokens/s. routing: the newest flush, in the order of the
    model. firing, resolved: alerts now, and those that are over. repairs: a record for each, oldest first. speeds: of a
    server, what it does now and how fast, as texts; None for training.
    """

    name: str
    status: str
    step: int
    total_steps: int | None
    loss: float | None
    val_perplexity: float | None
    tokens_per_s: float | None
    seconds_left: float | None
    losses: tuple[float, ...]
    routing: tuple[RoutingStats, ...]
    firing: tuple[Alert, ...]
    resolved: tuple[Alert, ...]
    repairs: tuple[Action, ...]
    speeds: Mapping[str, str] | None = None


def view_of(store: RunStore) -> RunView:
    """Read the view from a run's store: scalars loss, val_perplexity, tokens_per_s, and a server's; meta
    name, kind, total_steps, status."""
    with store.snapshot():
        meta = store.meta()
        server = meta.get("kind") == "server"
        losses = store.scalar_history("tokens_per_s" if server else "loss", last=2000)
        routing = store.latest_routing()
        last_change = {alert.key: alert for alert in store.alerts()}
        steps = [step for step, _, _ in losses[-1:]] + [stats.step for stats in routing[:1]]
        step, total = max(steps, default=0), meta.get("total_steps")
        return RunView(
            name=str(meta.get("name", store.path.parent.name)),
            status=str(meta.get("status", "running")),
            step=step,
            total_steps=total,
            loss=losses[-1][1] if losses and not server else None,
            val_perplexity=_latest(store, "val_perplexity"),
            tokens_per_s=_latest(store, "tokens_per_s"),
            seconds_left=_seconds_left(losses[-RATE_STEPS:], total),
            losses=tuple(value for _, value, _ in losses),
            routing=tuple(routing),
            firing=tuple(alert for alert in last_change.values() if alert.state == "firing"),
            resolved=tuple(alert for alert in last_change.values() if alert.state == "resolved"),
            repairs=tuple(repairs(store.actions())),
            speeds=_speeds(store) if server else None,
        )


def render(view: RunView) -> RenderableType:
    """The view as something rich can print, as wide as the console."""
    return _Screen(view)


def watch_run(run_dir: str | Path, *, follow: bool, interval: float = 1.0, console: Console | None = None) -> None:
    """Show a run, and with `follow` keep showing it until its status is no longer "running" or Ctrl-C.

    Without a terminal (a pipe, a log) it prints once. interval: seconds between looks at the store.
    Raises StoreError if run_dir is no run folder.
    """
    console = console or Console()
    with RunStore.open_readonly(run_dir) as store:
        view = view_of(store)
        if not (follow and console.is_terminal):
            console.print(render(view))
            return
        live = Live(render(view), console=console, auto_refresh=False, vertical_overflow="crop")
        interrupted = False
        try:  # not a `with`: Live leaves the terminal as it is when Ctrl-C comes while it starts
            live.start(refresh=True)
            while view.status == "running":
                time.sleep(interval)
                view = view_of(store)
                live.update(render(view), refresh=True)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            live.stop()
        if interrupted:
            console.print("No longer watching; the run itself goes on.", style="dim")


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values as a line of block characters, averaged down to at most `width`; "!" where not finite."""
    if not len(values) or width < 1:
        return ""
    with np.errstate(invalid="ignore"):  # infinities of both signs
        points = np.array([chunk.mean() for chunk in np.array_split(np.asarray(values), min(width, len(values)))])
    finite = points[np.isfinite(points)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((p - low) * scale)] if math.isfinite(p) else "!" for p in points)


# -------------------------------------------------------------------------------------------------- the screen


@dataclass(frozen=True)
class _Screen:
    """Renders a view at the width that the console has."""

    view: RunView

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        view, width = self.view, options.max_width
        parts: list[RenderableType] = [_header(view)]
        if view.losses:
            name = "loss " if view.speeds is None else "tokens/s "
            parts.append(Text.assemble((name, "dim"), (sparkline(view.losses, width - 4 - len(name)), "cyan")))
        if view.total_steps and view.status == "running":  # last: rich ends its bar without a new line
            parts.append(ProgressBar(total=view.total_steps, completed=view.step, width=width - 4))
        title = Text.assemble((view.name, "bold"), "  ", (view.status, "dim"))
        yield Panel(Group(*parts), title=title, title_align="left", border_style="red" if view.firing else "dim")
        yield _events(view)  # above the heat map: a low window must not cut off the alerts
        yield _heat_map(view, width) if view.routing else Text("No routing statistics yet.", style="dim")


def _header(view: RunView) -> Text:
    total = f"/{view.total_steps}" if view.total_steps else ""
    fields = [("step", f"{view.step}{total}")]
    if view.speeds is None:
        fields += [("loss", _number(view.loss, ".4f")), ("val perplexity", _number(view.val_perplexity, ".2f"))]
    fields += [("tokens/s", _number(view.tokens_per_s, ",.0f")), *(view.speeds or {}).items()]
    if view.status == "running" and view.speeds is None:
        fields.append(("left", _duration(view.seconds_left)))
    return Text("  ").join(Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in fields)


def _heat_map(view: RunView, width: int) -> RenderableType:
    names = dict(zip([s.layer for s in view.routing], short_names([s.layer for s in view.routing]), strict=True))
    alarmed = {alert.finding.layer for alert in view.firing}
    rows = _most_uneven(view.routing, alarmed)
    columns = ["effective", "MaxVio", "dead", "dropped"] + (["entropy"] if width >= NARROW else [])
    room = max(8, width - STATISTICS_WIDTH - ENTROPY_WIDTH * (width >= NARROW) - max(map(len, names.values())))
    # every row gets the cells of the widest layer, so that a table with mixed layers stays a grid
    num_experts = max(stats.num_experts for stats in rows)
    group = math.ceil(num_experts / min(room, MAX_CELLS))
    cell = max(1, min(NUMBER_CELL, (room + 1) // math.ceil(num_experts / group)))
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("layer")
    table.add_column("load of the experts")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for stats in rows:
        mark, style = ("! ", "bold red") if stats.layer in alarmed else ("  ", "")
        table.add_row(
            Text(mark + names[stats.layer], style), _load_row(stats, group, cell), *_statistics(stats)[: len(columns)]
        )
    left_out = len(view.routing) - len(rows)
    return Group(table, Text(_legend(rows[0].step, group, cell, left_out), style="dim"))


def _load_row(stats: RoutingStats, group: int, cell: int) -> Text:
    """One layer's experts: numbers where there is room for them, else blocks; each group shows its busiest expert."""
    load_E = stats.load_E
    busiest = [float(load_E[start : start + group].max()) for start in range(0, len(load_E), group)]
    if cell == NUMBER_CELL:
        return Text(" ").join(Text(_load_number(load), load_style(load, background=True)) for load in busiest)
    gap = " " if cell > 1 else ""
    return Text(gap).join(Text(load_block(load) * (cell - len(gap)), load_style(load)) for load in busiest)


def _statistics(stats: RoutingStats) -> list[Text]:
    even = stats.effective_experts / stats.num_experts
    return [
        Text(f"{stats.effective_experts:.1f}/{stats.num_experts}", "red" if even < 0.5 else ""),
        Text(f"{stats.max_violation:.2f}"),
        Text(str(len(stats.dead_experts)), "yellow" if stats.dead_experts else "dim"),
        Text(f"{stats.drop_rate:.1%}" if stats.drop_rate else "0", "yellow" if stats.drop_rate else "dim"),
        Text(f"{stats.load_entropy:.3f}"),
    ]


def _legend(step: int, group: int, cell: int, left_out: int) -> str:
    legend = f"step {step}, load relative to fair: 1.0 is fair"
    if cell < NUMBER_CELL:
        legend = f"step {step}, load relative to fair: {DEAD_CELL} below 0.1  ▁ 0.25  ▂ 0.5  ▄ 1  ▆ 2  █ 4 or more"
    if group > 1:
        legend += f"; one cell is {group} experts, the busiest shown"
    if left_out:
        legend += f"; {left_out} more even layers not shown"
    return legend


def _events(view: RunView) -> RenderableType:
    lines = [_alert_text(alert) for alert in view.firing[:MAX_FIRING]]
    if len(view.firing) > MAX_FIRING:
        lines.append(Text(f"and {len(view.firing) - MAX_FIRING} more alerts", "bold red"))
    lines += [_alert_text(alert) for alert in sorted(view.resolved, key=lambda alert: alert.step)[-RECENT:]]
    lines += [_repair_text(action) for action in view.repairs[-RECENT:]]
    return Group(*lines) if lines else Text("No alerts.", style="green")


def _repair_text(action: Action) -> Text:
    """One repair in a line: how it went, when, what, what it did, and why."""
    word, _, length = state_text(action).partition(" ")
    what = (f"{action.kind} on {target(action)}", "bold")
    why = f" because of {action.reason}" if action.reason else ""
    numbers = all_numbers(action.detail)
    step = (f"step {action.step}{length and f', {length}'}: ", "dim")
    note = (f" ({action.note})" if action.note else "", "dim")
    return Text.assemble((f"{word} ", STATE_STYLES[action.state]), step, what, why, numbers and f", {numbers}", note)


def _alert_text(alert: Alert) -> Text:
    finding = alert.finding
    if alert.state == "resolved":
        return Text(f"resolved step {alert.step}: {alert.key}, since step {alert.since_step}", style="dim")
    style = "bold red" if finding.severity == "critical" else "yellow"
    since = (f" since step {alert.since_step}: ", "dim")
    return Text.assemble((finding.severity, style), since, finding.message, ("\n  -> ", "dim"), finding.remedy)


# ------------------------------------------------------------------------------------------------ small formats


def load_block(load: float) -> str:
    """A load relative to fair as a block character: its height doubles in value every two eighths, fair is half."""
    if load < 0.1:
        return DEAD_CELL
    return BLOCKS[max(0, min(7, round(3 + 2 * math.log2(load))))]


def load_style(load: float, *, background: bool = False) -> str:
    """Blue for cold, grey for fair, red for hot, for a load relative to fair."""
    heat = max(-1.0, min(1.0, math.log2(max(load, 0.01)) / 2))  # -1 at a quarter of fair, 1 at four times
    grey, end = np.array([150, 150, 150]), np.array([225, 45, 45] if heat > 0 else [60, 110, 230])
    red, green, blue = (grey + abs(heat) * (end - grey)).astype(int)
    colour = f"rgb({red},{green},{blue})"
    return f"{'#ffffff' if abs(heat) > 0.5 else '#000000'} on {colour}" if background else colour


def short_names(names: Sequence[str]) -> list[str]:
    """Layer names without the dotted parts at the end that all share: blocks.0.moe -> blocks.0."""
    parts = [name.split(".") for name in names]
    while len(names) > 1 and len({part[-1] for part in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [part[:-1] for part in parts]
    return [".".join(part) for part in parts]


def _most_uneven(routing: Sequence[RoutingStats], alarmed: set[str]) -> list[RoutingStats]:
    """At most MAX_LAYERS layers, alarmed ones first to stay, in the order of the model."""
    order = sorted(routing, key=lambda s: (s.layer not in alarmed, s.effective_experts / s.num_experts))
    kept = {stats.layer for stats in order[:MAX_LAYERS]}
    return [stats for stats in routing if stats.layer in kept]


def _load_number(load: float) -> str:
    return f"{load:.1f}" if load < 9.95 else f"{load:>3.0f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, seconds_ = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds_:02d}s"


def _latest(store: RunStore, name: str) -> float | None:
    history = store.scalar_history(name, last=1)
    return history[0][1] if history else None


def _speeds(store: RunStore) -> dict[str, str]:
    """Of a server that has recorded them."""
    found = {words: (_latest(store, name), form) for words, (name, form) in SPEEDS.items()}
    return {words: format(value, form) for words, (value, form) in found.items() if value is not None}


def _seconds_left(history: Sequence[tuple[int, float, float]], total_steps: int | None) -> float | None:
    """From the pace of the last recorded steps; the median, because a resumed run has a gap in its history."""
    if total_steps is None or len(history) < 2:
        return None
    steps, times = np.array([entry[0] for entry in history]), np.array([entry[2] for entry in history])
    pace = float(np.median(np.diff(times) / np.diff(steps)))
    return pace * max(0, total_steps - int(steps[-1]))
