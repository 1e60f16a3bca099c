"""The dashboard as data: portable, laid out without overlap, and about metrics that are exported."""

import copy
import json
import re

import pytest
from tests.monitor.prometheus.cases import alert, scrape, window

from equipoise.monitor.baseline import baselines_of
from equipoise.monitor.prometheus.grafana import export_grafana
from equipoise.monitor.prometheus.live import LiveSource

DASHBOARD = export_grafana()


def test_it_is_json_and_belongs_to_no_data_source():
    text = json.dumps(DASHBOARD)
    assert json.loads(text) == DASHBOARD
    uids = re.findall(r'"uid": "([^"]*)"', text)
    assert set(uids) == {"${datasource}", "equipoise-routing"}
    assert "__inputs" not in DASHBOARD
    assert "id" not in DASHBOARD  # a number that belongs to one Grafana


def test_variables():
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "run", "layer"]  # each may use those before it
    assert variables["datasource"]["type"] == "datasource"
    assert '{run=~"$run"}' in variables["layer"]["query"]["query"]
    used = set(re.findall(r"\$\{?([a-z]+)", json.dumps(DASHBOARD["panels"])))
    assert used == set(variables)


def test_panels_do_not_overlap_and_stay_on_the_grid():
    taken = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        cells = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not taken & cells, panel["title"]
        assert grid["x"] + grid["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_panel_says_what_it_shows():
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(set(titles)) == len(titles)
    for panel in DASHBOARD["panels"]:
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"] in ("short", "percentunit", "s", "cps")
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["legendFormat"] or panel["type"] == "table"
            assert re.search(r'run=~"\$run"', target["expr"]), "a dashboard for one run"
    wanted = (
        "Load of each expert",
        "MaxVio",
        "Effective experts",
        "Entropies",
        "Dropped",
        "Standard deviation",
        "Alerts",
    )
    assert all(any(title.startswith(part) for title in titles) for part in wanted)


def test_every_metric_is_exported():
    source = LiveSource("run")
    source.routing([window(losses={"switch": 1.0})])
    source.alert(alert())
    exported = {name for name, _ in scrape(source, detail="expert", baselines=baselines_of([window()]))}
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            assert set(re.findall(r"equipoise_\w+", target["expr"])) <= exported, panel["title"]
    for variable in DASHBOARD["templating"]["list"][1:]:
        assert set(re.findall(r"equipoise_\w+", variable["query"]["query"])) <= exported


def through_grafanas_types(dashboard):
    """Read by the types that Grafana makes of its schemas, and written again: what they don't know is lost."""
    pytest.importorskip("grafana_foundation_sdk", reason="needs Grafana's types: pip install grafana-foundation-sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(copy.deepcopy(dashboard))))


def lost(before, after, path=""):
    """Where `after` has not what `before` has. It may have more: defaults."""
    if isinstance(before, dict):
        return [
            name
            for key, value in before.items()
            for name in (lost(value, after[key], f"{path}.{key}") if key in after else [f"{path}.{key}"])
        ]
    if isinstance(before, list) and len(before) == len(after):
        return [
            name for at, (a, b) in enumerate(zip(before, after, strict=True)) for name in lost(a, b, f"{path}[{at}]")
        ]
    return [] if before == after else [path]


def test_grafanas_own_types_know_every_field():
    assert lost(DASHBOARD, through_grafanas_types(DASHBOARD)) == []


def test_what_grafana_does_not_know_would_be_found():
    odd = json.loads(json.dumps(DASHBOARD))  # panels of a kind share their options
    odd["panels"][0]["options"]["colourMode"] = "value"
    odd["panels"][8]["targets"][0]["expression"] = "up"
    assert lost(odd, through_grafanas_types(odd)) == [
        ".panels[0].options.colourMode", ".panels[8].targets[0].expression"
    ]  # fmt: skip
