"""What the command line offers: print rules and dashboards, and serve the metrics of a run folder."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from equipoise.monitor import baseline
from equipoise.monitor.profiles import Profile
from equipoise.monitor.prometheus.alertmanager import export_alertmanager
from equipoise.monitor.prometheus.collector import MAX_SERIES, Detail, RoutingCollector
from equipoise.monitor.prometheus.grafana import export_grafana
from equipoise.monitor.prometheus.http import PORT, Exporter
from equipoise.monitor.prometheus.rules import RUNBOOKS, export_rules
from equipoise.monitor.prometheus.run_folder import RunFolderSource

Kind = Literal["rules", "grafana", "alertmanager"]


def export(kind: Kind, profile: Profile = "relative", *, runbooks: str = RUNBOOKS) -> str:
    """The text of a file: alert rules of a profile, a dashboard, or inhibition rules. Raises ValueError for another."""
    if kind == "rules":
        return export_rules(profile, runbooks=runbooks)
    if kind == "grafana":
        return json.dumps(export_grafana(), indent=2) + "\n"
    if kind == "alertmanager":
        return export_alertmanager()
    raise ValueError(f"kind: expected rules, grafana or alertmanager, got {kind!r}")


def serve(
    run: Path,
    port: int = PORT,
    detail: Detail = "layer",
    *,
    max_series: int = MAX_SERIES,
    baselines: Path | None = None,
    stop: threading.Event | None = None,
) -> int:
    """Serve the metrics of a running or finished run on 127.0.0.1 until Ctrl-C, SIGTERM, or `stop`. Returns 0.

    baselines: a JSON file of what `baseline.to_json` returned. Raises ValueError when there is no run, or the port is
    taken; ImportError, naming the extra, without prometheus_client.
    """
    normal = baseline.from_json(json.loads(baselines.read_text(encoding="utf-8"))) if baselines else {}
    collector = RoutingCollector(RunFolderSource(run), detail=detail, max_series=max_series, baselines=normal)
    stop = stop or threading.Event()
    with _stopped_by_signals(stop), Exporter(collector, port=port) as exporter:
        print(f"metrics of {run} at {exporter.url}; Ctrl-C ends", flush=True)
        stop.wait()
    return 0


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM set the event. Only the main thread may ask for signals; in another, `stop` is it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
