"""A Grafana dashboard of a run: load of every expert, balance and entropies of the layers, drops, logits, alerts.

Made of exported metrics alone: it works without the recording rules. The data source is a variable, so that the file
can be imported anywhere. To be written as JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_RUN, _LAYERS = '{run=~"$run"}', '{run=~"$run",layer=~"$layer"}'
_RATE = "$__rate_interval"
_COLUMNS = 24  # of Grafana's grid


@dataclass(frozen=True)
class Panel:
    """One panel. queries: (expression, legend). unit: a name of Grafana's. repeat: a variable, a panel per value."""

    kind: Literal["stat", "timeseries", "heatmap", "table"]
    title: str
    description: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    width: int = 12
    height: int = 8
    repeat: str | None = None

    def record(self, number: int, x: int, y: int) -> dict[str, Any]:
        """As it stands in a dashboard, at column x and row y of the grid."""
        instant = self.kind in ("stat", "table")
        found: dict[str, Any] = {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": _SOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "fieldConfig": {"defaults": {"unit": self.unit}, "overrides": []},
            "options": _OPTIONS[self.kind],
            "targets": [
                {
                    "refId": chr(ord("A") + index),
                    "datasource": _SOURCE,
                    "expr": expr,
                    "legendFormat": legend,
                    "instant": instant,
                    "range": not instant,
                    "format": "table" if self.kind == "table" else "time_series",
                }
                for index, (expr, legend) in enumerate(self.queries)
            ],
        }
        return found | ({"repeat": self.repeat, "repeatDirection": "h"} if self.repeat else {})


def export_grafana() -> dict[str, Any]:
    """The dashboard, for Grafana 9 and later: import it, or put the JSON into a provisioning folder."""
    return {
        "uid": "equipoise-routing",
        "title": "equipoise: routing",
        "description": "Mixture-of-Experts routing: is the load even, and where is it not?",
        "tags": ["equipoise", "mixture-of-experts"],
        "schemaVersion": 39,
        "editable": True,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": _placed((*_overview(), *_load(), *_balance(), *_router(), *_monitor())),
    }


def _variables() -> list[dict[str, Any]]:
    def names(name: str, label: str, query: str) -> dict[str, Any]:
        return {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": _SOURCE,
            "query": {"query": query, "refId": name},
            "refresh": 2,  # when the time range changes
            "multi": True,
            "includeAll": True,
            "current": {"text": ["All"], "value": ["$__all"]},
            "sort": 0 if name == "layer" else 1,
        }

    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        names("run", "Run", "label_values(equipoise_run_running, run)"),
        names("layer", "Layer", f"label_values(equipoise_layer_experts{_RUN}, layer)"),
    ]


# ------------------------------------------------------------------------------------------------------- the panels


def _overview() -> tuple[Panel, ...]:
    def stat(title: str, description: str, expr: str, unit: str = "short") -> Panel:
        return Panel("stat", title, description, ((expr, "{{run}}"),), unit, width=4, height=4)

    return (
        stat("Running", "1 while the run goes on.", f"equipoise_run_running{_RUN}"),
        stat(
            "Age of the newest flush",
            "Grows when the run stands still.",
            f"time() - equipoise_last_flush_timestamp_seconds{_RUN}",
            "s",
        ),
        stat(
            "Alerts firing",
            "Of the monitor's own rules.",
            f"sum by (run) (equipoise_alert_firing{_RUN}) or equipoise_run_running{_RUN} * 0",
        ),
        stat(
            "Smallest effective experts",
            "Share of its experts that the load of the worst layer is worth.",
            f"equipoise_worst_effective_experts_ratio{_RUN}",
            "percentunit",
        ),
        stat("Dead experts, all layers", "Experts below a tenth of their fair load.", f"equipoise_dead_experts{_RUN}"),
        stat(
            "Series left out", "The exporter's budget was too small for the detail.", f"equipoise_series_dropped{_RUN}"
        ),
    )


def _load() -> tuple[Panel, ...]:
    rate = f"sum by (run, layer, expert) (rate(equipoise_expert_assignments_total{_LAYERS}[{_RATE}]))"
    load = f"{rate} / on (run, layer) group_left () avg by (run, layer) ({rate})"
    return (
        Panel(
            "heatmap",
            "Load of each expert: $layer",
            "Relative to fair: 1 is even, 0 is dead. Needs the exporter's detail expert.",
            ((load, "{{expert}}"),),
            width=_COLUMNS,
            height=10,
            repeat="layer",
        ),
        Panel(
            "heatmap",
            "MaxVio by layer",
            "How far the busiest expert of each layer is above its fair load.",
            ((f"equipoise_layer_max_violation_ratio{_LAYERS}", "{{layer}}"),),
            width=_COLUMNS,
            height=10,
        ),
    )


def _balance() -> tuple[Panel, ...]:
    def lines(title: str, description: str, *queries: tuple[str, str], unit: str = "short") -> Panel:
        return Panel("timeseries", title, description, queries, unit)

    tokens = f"rate(equipoise_layer_tokens_total{_LAYERS}[{_RATE}])"
    all_assignments = f"ignoring (reason) group_left () rate(equipoise_layer_assignments_total{_LAYERS}[{_RATE}])"
    dropped = f"rate(equipoise_layer_dropped_assignments_total{_LAYERS}[{_RATE}]) / {all_assignments}"
    rerouted = f"rate(equipoise_layer_rerouted_assignments_total{_LAYERS}[{_RATE}]) / {all_assignments}"
    return (
        lines(
            "MaxVio",
            "Load of the busiest expert over fair, minus 1: 0 is even.",
            (f"equipoise_layer_max_violation_ratio{_LAYERS}", "{{layer}}"),
        ),
        lines(
            "Effective experts",
            "How many evenly loaded experts the load is worth, as a share of all.",
            (f"equipoise_layer_effective_experts{_LAYERS} / equipoise_layer_experts{_LAYERS}", "{{layer}}"),
            unit="percentunit",
        ),
        lines(
            "Largest share of tokens",
            "Of the tokens, those that reach the busiest expert.",
            (f"equipoise_layer_max_token_share_ratio{_LAYERS}", "{{layer}}"),
            unit="percentunit",
        ),
        lines(
            "Dead experts",
            "Experts below a tenth of their fair load.",
            (f"equipoise_layer_dead_experts{_LAYERS}", "{{layer}}"),
        ),
        lines(
            "Dropped and rerouted assignments",
            "Share of all assignments, by reason.",
            (dropped, "{{layer}} dropped: {{reason}}"),
            (rerouted, "{{layer}} rerouted: {{reason}}"),
            unit="percentunit",
        ),
        lines("Tokens per second", "Routed by each layer.", (tokens, "{{layer}}"), unit="cps"),
    )


def _router() -> tuple[Panel, ...]:
    def lines(title: str, description: str, *names: tuple[str, str], unit: str = "short") -> Panel:
        queries = tuple((f"equipoise_layer_{name}{_LAYERS}", legend) for name, legend in names)
        return Panel("timeseries", title, description, queries, unit)

    return (
        lines(
            "Entropies",
            "Over ln E. Load: 1 is even. Token: high means undecided. Marginal: low means the same experts for all.",
            ("load_entropy_ratio", "{{layer}} load"),
            ("token_entropy_ratio", "{{layer}} token"),
            ("marginal_entropy_ratio", "{{layer}} marginal"),
            unit="percentunit",
        ),
        lines(
            "Standard deviation of the router logits",
            "With the baseline's, where there is one.",
            ("logit_std", "{{layer}}"),
            ("baseline_logit_std", "{{layer}} baseline"),
        ),
        lines("Log-sum-exp of the router logits", "In health in the tens.", ("logit_logsumexp", "{{layer}}")),
        lines("Balancing losses", "Before their coefficients.", ("balance_loss", "{{layer}} {{loss}}")),
    )


def _monitor() -> tuple[Panel, ...]:
    return (
        Panel(
            "table",
            "Alerts that fire",
            "Of the monitor's own rules: they have the numbers behind them in the run folder.",
            ((f"equipoise_alert_firing{_RUN}", ""),),
        ),
        Panel(
            "timeseries",
            "Cost of watching",
            "Share of one core, by part.",
            ((f"rate(equipoise_monitor_seconds_total{_RUN}[{_RATE}])", "{{part}}"),),
            "percentunit",
        ),
    )


def _placed(panels: tuple[Panel, ...]) -> list[dict[str, Any]]:
    """Left to right, then down; a panel that has no room in its row begins the next."""
    found: list[dict[str, Any]] = []
    x = y = row_height = 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > _COLUMNS:
            x, y, row_height = 0, y + row_height, 0
        found.append(panel.record(number, x, y))
        x, row_height = x + panel.width, max(row_height, panel.height)
    return found


_OPTIONS: dict[str, dict[str, Any]] = {
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "none"},
    "timeseries": {
        "legend": {"displayMode": "table", "placement": "right", "calcs": ["lastNotNull", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "heatmap": {
        "calculate": False,  # each series is a row of cells, coloured by its value
        "color": {"mode": "scheme", "scheme": "RdYlBu", "reverse": True, "steps": 64},
        "yAxis": {"axisPlacement": "left"},
        "legend": {"show": True},
        "tooltip": {"show": True},
    },
    "table": {"showHeader": True},
}
