"""Routing, alerts and repairs to a Weights & Biases run.

It takes a run that you have opened (`wandb.init`) and imports nothing, so any object with the same methods will do.
Alerts go through `run.alert`, which sends them by mail or to Slack as the account has it.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from equipoise.monitor.sinks.labels import MAX_TEXT, summary
from equipoise.monitor.sinks.layer_numbers import layer_numbers
from equipoise.monitor.sinks.plain import name_line, one_line
from equipoise.types import Action, Alert, RoutingStats

LEVELS = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}
STEP = "routing/step"


class Run(Protocol):
    """What is used of `wandb.Run` (docs.wandb.ai/ref/python/experiments/run)."""

    def define_metric(self, name: str, step_metric: str | None = None) -> Any: ...  # noqa: D102 - as in wandb

    def log(self, data: dict[str, Any]) -> None: ...  # noqa: D102 - as in wandb

    def alert(self, title: str, text: str, level: str | None = None) -> None: ...  # noqa: D102 - as in wandb


class WandB:
    """Logs "routing/LAYER/NUMBER" against its own step metric, so that it never disturbs the run's step counter.

    run: an open run. name: said in alerts.
    """

    def __init__(self, run: Run, *, name: str) -> None:
        self._run, self._name = run, name
        run.define_metric(STEP)
        run.define_metric("routing/*", step_metric=STEP)
        run.define_metric("repairs/*", step_metric=STEP)

    def routing(self, window: Sequence[RoutingStats]) -> None:
        """Log all layers of one window at once."""
        values = {
            f"routing/{name_line(stats.layer, 200)}/{number}": value
            for stats in window
            for number, value in layer_numbers(stats).items()
        }
        if window:
            self._run.log({STEP: window[0].step, **values})

    def alert(self, alert: Alert) -> None:
        """Send one change of an alert."""
        finding = alert.finding
        level = "INFO" if alert.state == "resolved" else LEVELS[finding.severity]
        title = one_line(f"{alert.state.capitalize()}: {summary(alert, self._name)}", 200)
        text = html.escape(one_line(f"{finding.message} What to do: {finding.remedy}", MAX_TEXT), quote=False)
        self._run.alert(title=html.escape(title, quote=False), text=text, level=level)

    def action(self, action: Action) -> None:
        """Log one change of a repair: 1 under "repairs/LAYER/KIND/STATE", its numbers, and its note as text."""
        place = f"repairs/{name_line(action.layer, 200)}/{name_line(action.kind, 100)}"
        numbers: Mapping[str, float] = {f"{place}/{name}": value for name, value in action.detail.items()}
        note = {f"{place}/note": html.escape(one_line(action.note, MAX_TEXT), quote=False)} if action.note else {}
        self._run.log({**numbers, **note, f"{place}/{action.state}": 1, STEP: action.step})
