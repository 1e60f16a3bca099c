"""The tables of docs/operations, made from what the code exports: `python -m tests.operations.tables` writes them.

A table stands below its comment `<!-- table: NAME -->` and ends at the next blank line. The tests compare.
"""

import re
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry
from tests.monitor.prometheus.cases import alert, window

from equipoise.monitor.baseline import baselines_of
from equipoise.monitor.prometheus.collector import RoutingCollector
from equipoise.monitor.prometheus.grafana import export_grafana
from equipoise.monitor.prometheus.live import LiveSource
from equipoise.monitor.prometheus.recording import recording_rules
from equipoise.monitor.prometheus.rules import alert_rules
from equipoise.monitor.prometheus.timing import Timing, duration
from equipoise.monitor.sinks.background import Background
from equipoise.serve.delivery import DeliveryCollector
from equipoise.serve.engine import Occupancy
from equipoise.serve.expert_cache import ExpertCacheCollector
from equipoise.serve.metrics import ServingMetrics
from equipoise.small import CacheCounts
from equipoise.types import Action

PAGES = Path(__file__).parents[2] / "docs" / "operations"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(?=\n\n|\Z)", re.DOTALL)
UNITS = (  # the first that a name ends with
    ("_timestamp_seconds", "s since 1970"),
    ("_seconds", "s"),
    ("_nats", "nat"),
    ("_ratio", "ratio"),
    ("logsumexp", "logit"),
    ("logit_mean", "logit"),
    ("logit_std", "logit"),
    ("balance_loss", "loss"),
    ("_bytes", "byte"),
    ("bytes_held", "byte"),
    ("bytes_read", "byte"),
    ("_info", "labels"),
    ("", "count"),
)


def routing_families(detail="expert"):
    """Those of the exporter, each with at least one series."""
    source = LiveSource("run")
    source.routing([window(losses={"switch": 1.0}, rerouted={"next_choice": 1}, dropped={"capacity": 1, "tokens": 1})])
    source.alert(alert())
    source.left([alert("logits").finding])
    source.action(Action("quantile_bias", "blocks.0", 100, "blocks.0:collapse"))
    registry = CollectorRegistry()
    registry.register(RoutingCollector(source, detail=detail, baselines=baselines_of([window()])))
    return [(family, _sample_labels(family)) for family in registry.collect()]


def serving_families():
    """Those that a server adds; the cache's where experts are read from a file, deliveries where alerts are sent."""
    metrics = ServingMetrics(("layer",), lambda: 0, lambda: Occupancy(0, 0, 1, 1))
    found = []
    for collector in list(metrics.registry._collector_to_names):
        [family] = collector.collect()
        found.append((family, list(collector._labelnames)))
    found += [(family, []) for family in ExpertCacheCollector(CacheCounts).collect()]
    with Background(LiveSource("run"), name="slack") as queue:
        return found + [(family, _sample_labels(family)) for family in DeliveryCollector([queue]).collect()]


def _sample_labels(family):
    assert family.samples, family.name
    return list(family.samples[0].labels)


def metric_rows(families):
    """name, type and unit, labels, meaning."""
    rows = []
    for family, labels in families:
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        unit = next(
            unit for ending, unit in UNITS if (family.name if family.type == "counter" else name).endswith(ending)
        )
        kind = family.type if unit == "labels" else f"{family.type}, {unit}"
        rows.append((f"`{name}`", kind, ", ".join(labels), family.documentation))
    return rows


def level_rows(level):
    """Of the families that a level of detail has, and the level before it has not."""
    before = {"summary": set(), "layer": _names("summary"), "expert": _names("layer")}[level]
    return metric_rows([each for each in routing_families(level) if each[0].name not in before])


def _names(detail):
    return {family.name for family, _ in routing_families(detail)}


def alert_rows(profile):
    """name, a link to its runbook; severity; for; what it says. Of absolute: those that relative has not."""
    shared = {rule.name for rule in alert_rules("relative", Timing())} if profile == "absolute" else set()
    rows = {}
    for rule in alert_rules(profile, Timing()):
        if rule.name not in shared:
            row = rows.setdefault(rule.name, (set(), duration(rule.seconds), _says(rule)))
            row[0].add(rule.severity or "that of the finding")
    order = ["info", "warning", "critical", "that of the finding"]
    return [
        (f"[{name}](../runbooks.md#{name.lower()})", ", ".join(sorted(found, key=order.index)), seconds, text)
        for name, (found, seconds, text) in rows.items()
    ]


def _says(rule):
    """The summary without its labels; of a fixed limit, what is limited and the limit."""
    if "fixed limit" in rule.summary:
        [limit] = re.findall(r"[<>] [\d.]+", rule.expr.split(") and ")[0])
        return re.sub(r"\{\{[^}]*\}\}", "x", rule.description).rstrip(".") + f", x {limit}"
    return re.sub(r"^[\s:,]*(expert )?", "", re.sub(r"\{\{[^}]*\}\}:? ?,? ?", "", rule.summary))


def recording_rows():
    """name, the metrics that it is made of."""
    return [
        (f"`{rule['record']}`", ", ".join(f"`{each}`" for each in _read(str(rule["expr"]))))
        for rule in recording_rules(Timing())
    ]


def _read(expr):
    return dict.fromkeys(re.findall(r"[a-z_]+:equipoise_\w+:\w+|\bequipoise_\w+", expr))


def panel_rows():
    """title, kind, unit, what it shows."""
    rows = []
    for panel in export_grafana()["panels"]:
        unit = panel["fieldConfig"]["defaults"]["unit"]
        rows.append((panel["title"].replace("$layer", "each layer"), panel["type"], unit, panel["description"]))
    return rows


METRIC = ("metric", "type, unit", "labels", "meaning")
ALERT = ("alert", "severity", "for", "says")
TABLES = {
    "summary": lambda: (METRIC, level_rows("summary")),
    "layer": lambda: (METRIC, level_rows("layer")),
    "expert": lambda: (METRIC, level_rows("expert")),
    "serving": lambda: (METRIC, metric_rows(serving_families())),
    "alerts_relative": lambda: (ALERT, alert_rows("relative")),
    "alerts_absolute": lambda: (ALERT, alert_rows("absolute")),
    "recording": lambda: (("recorded as", "from"), recording_rows()),
    "panels": lambda: (("panel", "kind", "unit", "shows"), panel_rows()),
}


def markdown(name):
    """The table as it stands in a page."""
    head, rows = TABLES[name]()
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def renewed(text):
    """A page with its tables as the code has them."""
    return TABLE.sub(lambda found: found[1] + markdown(found[2]), text)


if __name__ == "__main__":
    for path in sorted(PAGES.glob("*.md")):
        old = path.read_text(encoding="utf-8")
        if (new := renewed(old)) != old:
            path.write_text(new, encoding="utf-8")
            print(f"{path.name}: tables written", file=sys.stderr)
