"""Commands for Prometheus: files that it and Grafana and Alertmanager read, and the metrics of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from equipoise.monitor.profiles import Profile


def export(
    kind: Annotated[Literal["rules", "grafana", "alertmanager"], tyro.conf.Positional],
    /,
    *,
    profile: Profile = "relative",
    runbooks: str | None = None,
) -> int:
    """Print alert rules for Prometheus, a dashboard for Grafana, or inhibition rules for Alertmanager.

    For example: equipoise export rules > equipoise.rules.yml

    Args:
        kind: rules (recording and alert rules, YAML), grafana (JSON), or alertmanager (YAML).
        profile: Which rules: relative to fair share, or absolute, a well-known checklist taken literally.
        runbooks: Address of docs/runbooks.md, for the links in the alerts.
    """
    from equipoise.monitor.prometheus.commands import export as text_of
    from equipoise.monitor.prometheus.rules import RUNBOOKS

    print(text_of(kind, profile, runbooks=runbooks or RUNBOOKS), end="")
    return 0


def exporter(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    port: int = 9469,
    detail: Literal["summary", "layer", "expert"] = "layer",
    max_series: int = 10_000,
    baselines: Path | None = None,
) -> int:
    """Serve the metrics of a running or finished run to Prometheus, on 127.0.0.1, until Ctrl-C.

    For example: equipoise exporter runs/demo --port 9469 --detail expert

    Args:
        run: The run folder.
        port: 0 takes any that is free.
        detail: Series per run, per layer, or per expert. What does not fit in --max-series falls back, and says so.
        max_series: The most series that a scrape may have.
        baselines: A JSON file of the layers in health, for rules that compare.
    """
    from equipoise.monitor.prometheus.commands import serve

    return serve(run, port, detail, max_series=max_series, baselines=baselines)
