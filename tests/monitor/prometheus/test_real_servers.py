"""The whole way, with the real Prometheus and the real Alertmanager: live routers, a collapse, one page, and its end.

Two live models are watched and scraped: "judged" by the monitor's own rules, "plain" by Prometheus' alone. In both the
router of the second layer collapses onto two of eight experts and is repaired. Everything listens on 127.0.0.1.
"""

import contextlib
import json
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field

import pytest
import torch
import yaml
from tests.monitor.debian import binary
from tests.monitor.prometheus.real import TIMING, free_port, prometheus, running
from tests.monitor.sinks.cases import Server
from torch import nn

from equipoise.layer import MoE
from equipoise.monitor.baseline import baselines_of
from equipoise.monitor.prometheus.alertmanager import inhibit_rules
from equipoise.monitor.prometheus.collector import RoutingCollector
from equipoise.monitor.prometheus.grafana import export_grafana
from equipoise.monitor.prometheus.http import Exporter
from equipoise.monitor.prometheus.live import LiveSource
from equipoise.monitor.prometheus.rules import export_rules
from equipoise.monitor.watch import watch
from equipoise.routing import SwitchLoss, TopK

pytestmark = pytest.mark.slow
D, E, K, T = 16, 8, 2, 512  # T K / E = 128 assignments per expert and flush: enough for an opinion
LAYER, FAVOURITES = "1", (5, 6)
PATIENCE_S = 60


class Patient:
    """A model that is watched and exported, and trained on by nobody. step() is one forward and one flush."""

    def __init__(self, run, profile):
        torch.manual_seed(1)
        layers = [MoE(D, 8, E, router=TopK(k=K), balance=(SwitchLoss(coef=0.01),)) for _ in range(2)]
        for layer in layers:
            nn.init.normal_(layer.router.weight)
            nn.init.zeros_(layer.router.weight[:, 0])  # the input that is the same for all tokens: see `step`
        self.model, self.source, self.number = nn.Sequential(*layers), LiveSource(run), 0
        self.eye = watch(self.model, every=1, profile=profile, sinks=[self.source])
        self.step()
        normal = baselines_of(self.eye.stats())
        self.exporter = Exporter(RoutingCollector(self.source, detail="expert", baselines=normal), port=0)

    def step(self):
        self.number += 1
        x_TD = torch.randn(T, D)
        x_TD[:, 0] = 1.0  # a router can prefer an expert by it
        for layer in self.model:
            layer(x_TD)
        self.eye.step(self.number)

    def prefer(self, by):
        with torch.no_grad():
            for expert in FAVOURITES:
                self.model[1].router.weight[expert, 0] += by

    def close(self):
        self.exporter.close()
        self.eye.detach()


@dataclass
class Stack:
    """The servers, and what was seen on the way: names of alerts by moment, notifications, answers to queries."""

    prometheus: str
    alertmanager: str
    webhook: Server
    patients: list
    notes: dict = field(default_factory=dict)
    pages: list = field(default_factory=list)

    def get(self, server, path, **parameters):
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{server}{path}?{query}", timeout=10) as answer:
            return json.load(answer)

    def query(self, expr):
        found = self.get(self.prometheus, "/api/v1/query", query=expr)
        assert found["status"] == "success", found
        return found["data"]["result"]

    def firing(self):
        return {
            (labels["alertname"], labels["run"], labels["layer"])
            for labels in (each["metric"] for each in self.query('ALERTS{alertstate="firing"}'))
        }

    def until(self, what, condition):
        """Go on with the models until the condition holds; returns what it returned."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            for patient in self.patients:
                patient.step()
            self.pages += [page.body for page in self.webhook.all()]
            with contextlib.suppress(urllib.error.URLError, ConnectionError):  # not up yet
                if found := condition():
                    return found
            assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}"
            threading.Event().wait(0.05)

    def paged(self, status, run):
        """The alerts of that run in all notifications with that status."""
        return [
            alert
            for page in self.pages
            for alert in page["alerts"]
            if alert["status"] == status and alert["labels"]["run"] == run
        ]


def alertmanager_program(folder):
    """Debian's Alertmanager, which reads its templates from where its package is installed: here, from `folder`.

    A copy with that path replaced by one of the same length, "././...", and the templates beside it.
    """
    installed = b"/usr/share/prometheus/alertmanager"
    program = binary("prometheus-alertmanager", "usr/bin/prometheus-alertmanager")
    for name in ("default.tmpl", "email.tmpl"):
        shutil.copy(binary("prometheus-alertmanager", f"{installed.decode()[1:]}/{name}"), folder)
    here = b"./" * (len(installed) // 2)
    assert len(here) == len(installed)
    copy = folder / "alertmanager"
    copy.write_bytes(program.read_bytes().replace(installed, here))
    copy.chmod(0o700)
    return copy


@contextlib.contextmanager
def alertmanager(folder, webhook):
    folder.mkdir()
    config = {
        "route": {
            "receiver": "test",
            "group_by": ["run", "layer"],
            "group_wait": "1s",
            "group_interval": "1s",
            "repeat_interval": "1h",
        },
        "receivers": [{"name": "test", "webhook_configs": [{"url": f"{webhook.url}/alerts"}]}],
        "inhibit_rules": inhibit_rules(),
    }
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    program = alertmanager_program(folder)
    options = [f"--web.listen-address={address}", "--cluster.listen-address=", f"--storage.path={folder}/data"]
    with running([program, "--config.file=config.yml", *options], folder):
        yield f"http://{address}"


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    with contextlib.ExitStack() as open_things:
        webhook = Server()
        open_things.callback(webhook.close)
        patients = [Patient("judged", "relative"), Patient("plain", None)]
        for patient in patients:
            open_things.callback(patient.close)
        alerts = open_things.enter_context(alertmanager(folder / "alertmanager", webhook))
        targets = [f"127.0.0.1:{patient.exporter.port}" for patient in patients]
        url = open_things.enter_context(prometheus(folder / "prometheus", targets, alerts))
        stack = Stack(url, alerts, webhook, patients)
        live_through(stack)
        yield stack


def live_through(stack):
    """Health, collapse, repair; writes down what is seen."""
    loads = "run_layer_expert:equipoise_expert_load:ratio5s"
    stack.until("loads of both runs", lambda: len(stack.query(loads)) == 2 * 2 * E)
    # a window later nothing has fired
    begin = time.monotonic()
    stack.until("some health", lambda: time.monotonic() > begin + TIMING.window)
    stack.notes["health"] = stack.query('count_over_time(ALERTS{alertstate="firing"}[1m])')
    for patient in stack.patients:
        patient.prefer(by=20.0)
    dead = {("EquipoiseDeadExperts", run, LAYER) for run in ("judged", "plain")}
    cold = {("EquipoiseExpertCold", run, LAYER) for run in ("judged", "plain")}
    stack.until("alerts about dead experts", lambda: dead | cold <= stack.firing())
    stack.notes["collapse"] = stack.firing()
    stack.until("pages", lambda: stack.paged("firing", "judged") and stack.paged("firing", "plain"))
    stack.notes["dashboard"] = {
        (panel["title"], target["expr"]): stack.query(concrete(target["expr"]))
        for panel in export_grafana()["panels"]
        for target in panel["targets"]
    }
    stack.notes["alertmanager"] = stack.get(stack.alertmanager, "/api/v2/alerts")
    for patient in stack.patients:
        patient.prefer(by=-20.0)
    stack.until("the end", lambda: stack.paged("resolved", "judged") and stack.paged("resolved", "plain"))
    stack.notes["targets"] = stack.get(stack.prometheus, "/api/v1/targets")["data"]["activeTargets"]
    stack.notes["rules"] = stack.get(stack.prometheus, "/api/v1/rules")["data"]["groups"]


def concrete(expr):
    """A panel's query as Grafana would send it with all runs and layers chosen."""
    return expr.replace("$__rate_interval", "5s").replace("$run", ".+").replace("$layer", ".+")


def test_prometheus_scrapes_and_evaluates_without_errors(stack):
    assert [(each["health"], each["lastError"]) for each in stack.notes["targets"]] == [("up", "")] * 2
    rules = [rule for group in stack.notes["rules"] for rule in group["rules"]]
    assert len(rules) == export_rules("relative").count("expr:")
    assert {rule["health"] for rule in rules} == {"ok"}


def test_health_is_silent(stack):
    assert stack.notes["health"] == []


def test_the_collapse_fires_in_the_layer_that_has_it(stack):
    fired = stack.notes["collapse"]
    assert {layer for _, _, layer in fired} == {LAYER}
    expected = {"EquipoiseLayerCollapse", "EquipoiseDeadExperts", "EquipoiseExpertCold"}
    assert expected <= {name for name, run, _ in fired if run == "plain"}
    assert {*expected, "EquipoiseMonitorAlert"} <= {name for name, run, _ in fired if run == "judged"}
    assert ("EquipoiseMonitorAlert", "plain", LAYER) not in fired


@pytest.mark.parametrize(("run", "name"), [("judged", "EquipoiseMonitorAlert"), ("plain", "EquipoiseLayerCollapse")])
def test_one_page_per_collapse_and_its_end(stack, run, name):
    for status in ("firing", "resolved"):
        alerts = stack.paged(status, run)
        assert {(each["labels"]["alertname"], each["labels"]["layer"]) for each in alerts} == {(name, LAYER)}
    annotations = alerts[0]["annotations"]
    assert annotations["runbook_url"] == f"docs/runbooks.md#{name.lower()}"
    assert annotations["summary"].startswith(f"{run}: {LAYER}")
    assert alerts[0]["labels"]["severity"] == "critical"
    assert {page["version"] for page in stack.pages} == {"4"}


def test_symptoms_are_inhibited(stack):
    of_layer = [each for each in stack.notes["alertmanager"] if each["labels"].get("layer") == LAYER]
    symptoms = [
        each for each in of_layer if each["labels"]["alertname"] in ("EquipoiseDeadExperts", "EquipoiseExpertCold")
    ]
    assert {each["labels"]["run"] for each in symptoms} == {"judged", "plain"}
    for each in symptoms:
        assert each["status"]["state"] == "suppressed", each["labels"]
        assert each["status"]["inhibitedBy"]


def test_every_query_of_the_dashboard_has_an_answer(stack):
    empty = [question for question, answer in stack.notes["dashboard"].items() if not answer]
    assert not empty
    [loads] = [answer for (title, _), answer in stack.notes["dashboard"].items() if title.startswith("Load of each")]
    by_expert = {
        series["metric"]["expert"]: float(series["value"][1])
        for series in loads
        if series["metric"]["run"] == "plain" and series["metric"]["layer"] == LAYER
    }
    assert len(by_expert) == E
    assert all((by_expert[str(expert)] > 2) == (expert in FAVOURITES) for expert in range(E))
