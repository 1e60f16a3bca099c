"""The rule files as text: accepted by Prometheus' own tools, named by the conventions, each with something to do."""

import re
import subprocess
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.monitor.debian import binary
from tests.monitor.prometheus.cases import promtool, run_promtool, scrape, window
from tests.monitor.prometheus.worlds import END, LAYER, NUM_TOKENS, World, series, shares

from equipoise.cli import COMMANDS
from equipoise.monitor.alert_names import RULES, alert_name
from equipoise.monitor.detectors import CollapseDetector
from equipoise.monitor.prometheus.alertmanager import export_alertmanager, inhibit_rules
from equipoise.monitor.prometheus.live import LiveSource
from equipoise.monitor.prometheus.rules import alert_rules, export_rules
from equipoise.monitor.prometheus.timing import Timing, duration

PROFILES = ("relative", "absolute")
RUNBOOKS = Path(__file__).parents[3] / "docs" / "runbooks.md"


def parsed(profile, **options):
    [group] = yaml.safe_load(export_rules(profile, **options))["groups"]
    rules = group["rules"]
    return [r for r in rules if "record" in r], [r for r in rules if "alert" in r]


@pytest.mark.parametrize("profile", PROFILES)
def test_promtool_accepts_the_file(profile, tmp_path):
    (tmp_path / "rules.yml").write_text(export_rules(profile))
    command = [promtool(), "check", "rules", "--lint=all", "--lint-fatal", "rules.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    recorded, alerts = parsed(profile)
    assert f"SUCCESS: {len(recorded) + len(alerts)} rules found" in done.stdout


@pytest.mark.parametrize("profile", PROFILES)
def test_every_alert_says_what_it_is_and_what_to_do(profile):
    sections = re.findall(r"^## (\w+)$", RUNBOOKS.read_text(encoding="utf-8"), re.MULTILINE)
    for rule in parsed(profile, runbooks="https://example.org/runbooks.md")[1]:
        name, annotations = rule["alert"], rule["annotations"]
        assert re.fullmatch(r"\d+[smh]", rule["for"])
        assert rule.get("labels", {}).get("severity") in ("critical", "warning", "info", None)
        assert annotations.keys() == {"summary", "description", "remedy", "runbook_url"}
        assert all(len(text) > 20 for text in annotations.values()), name
        assert "{{ $labels." in annotations["summary"]
        assert annotations["runbook_url"] == f"https://example.org/runbooks.md#{name.lower()}"
        assert name in sections
    [without] = {r["alert"] for r in parsed(profile)[1] if "labels" not in r}
    assert without == "EquipoiseMonitorAlert"  # its series carry the severity of the monitor's finding


def test_the_runbook_has_a_section_for_each_alert_and_no_others():
    sections = re.findall(r"^## (Equipoise\w+)$", RUNBOOKS.read_text(encoding="utf-8"), re.MULTILINE)
    names = {rule.name for profile in PROFILES for rule in alert_rules(profile, Timing())}
    assert sorted(sections) == sorted(names | RULES.keys())


def test_what_prometheus_and_the_sinks_find_has_one_name():
    """Each alert of the exported rules is that of a rule of the monitor, but those that the monitor has no rule for."""
    names = {rule.name for profile in PROFILES for rule in alert_rules(profile, Timing())}
    without = {"EquipoiseExpertCold", "EquipoiseExpertHot"}  # of single experts
    without |= {f"Equipoise{name}" for name in ("MonitorAlert", "MonitorStalled", "ExporterDown", "SeriesDropped")}
    assert names - RULES.keys() == without | {"EquipoiseSourceUnreadable"}
    for profile in PROFILES:
        for rule in alert_rules(profile, Timing()):
            if rule.name in RULES:  # the monitor's finding of that rule and severity
                assert alert_name(RULES[rule.name], rule.severity) == rule.name


def test_the_runbook_names_commands_that_exist():
    text = RUNBOOKS.read_text(encoding="utf-8")
    used = set(re.findall(r"(?:`|^)equipoise (\S+)(?: RUN)?((?: --[a-z]+)*)", text, re.MULTILINE))
    assert {command for command, _ in used} == {"watch", "train", "triage"}
    for command, options in used:
        known = set(signature(COMMANDS[command]).parameters)
        assert {option.strip("-") for option in options.split()} <= known | {"json"}, (command, options)


def test_recording_rules_are_named_level_metric_operation():
    for rule in parsed("relative")[0]:
        level, metric, operation = rule["record"].split(":")
        assert level in ("run", "run_layer", "run_layer_expert")
        assert metric.startswith("equipoise_")
        assert re.fullmatch(r"(rate|ratio|increase)(10m)?|max|count|limit|per_expert", operation), operation


def test_exported_metrics_and_recorded_ones_cannot_be_mixed_up():
    """Each metric that the rules read is exported, or recorded by a rule before it."""
    source = LiveSource("run")
    source.routing([window(losses={"switch": 1.0})])
    exported = {name for name, _ in scrape(source, detail="expert")}
    exported |= {
        "up",
        "equipoise_alert_firing",
        "equipoise_aftermath",
        "equipoise_layer_baseline_logit_std",
    }  # not there in this scrape
    for profile in PROFILES:
        recorded, alerts = parsed(profile)
        known = set(exported)
        for rule in [*recorded, *alerts]:
            read = set(re.findall(r"[a-z_]+:equipoise_\w+:\w+|\bequipoise_\w+", rule["expr"]))
            assert read <= known, (rule, read - known)
            known |= {rule["record"]} if "record" in rule else set()


@pytest.mark.parametrize("detail", ["layer", "expert"])
def test_prometheus_derives_what_the_detector_derives(detail, tmp_path):
    """At detail "layer" of one flush; at "expert" of all ten of the window, so with ten times the tokens."""
    counts = shares(5, 3, 0, 1, 1, 2, 2, 2)
    flushes = 10 if detail == "expert" else 1
    stats = window(LAYER, 0, flushes * counts, num_tokens=flushes * NUM_TOKENS)
    expected = {
        "max_token_share:ratio": stats.max_token_share,
        "max_token_share:limit": CollapseDetector().token_share_limit(stats),
        "effective_experts:ratio": stats.effective_experts / 8,
        "load_entropy:ratio": stats.load_entropy,
        "max_load:ratio": stats.max_violation + 1,
        "min_load:ratio": 0.0,
        "dead_experts:count": 1,
        "fair_token_share:ratio": counts.sum() / NUM_TOKENS / 8,
        "judged_assignments:per_expert": flushes * counts.sum() / 8,
    }
    checks = [
        {
            "expr": f"round(run_layer:equipoise_{name}, 0.000001)",
            "eval_time": f"{END - 1}m",
            "exp_samples": [
                {
                    "labels": '{job="equipoise",instance="127.0.0.1:9469",run="run",layer="blocks.0"}',
                    "value": float(np.round(number, 6)),
                }
            ],
        }
        for name, number in expected.items()
    ]
    tests = [{"interval": "1m", "input_series": series(World(counts=counts), detail), "promql_expr_test": checks}]
    done = run_promtool(tmp_path, "relative", tests)
    assert done.returncode == 0, done.stdout + done.stderr


def test_other_times(tmp_path):
    timing = Timing(window=60, hold=90, stalled=7200, evaluate=15)
    recorded, alerts = parsed("relative", timing=timing)
    assert "run_layer:equipoise_layer_tokens:rate1m" in {rule["record"] for rule in recorded}
    assert {rule["for"] for rule in alerts} == {"90s", "0s"}
    [stalled] = [rule["expr"] for rule in alerts if rule["alert"] == "EquipoiseMonitorStalled"]
    assert "> 7200" in stalled
    assert [duration(s) for s in (0, 1, 60, 90, 600, 3600, 86400)] == ["0s", "1s", "1m", "90s", "10m", "1h", "1d"]


@pytest.mark.parametrize("name", ["window", "hold", "stalled", "evaluate"])
def test_times_are_checked(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1 second, got 0"):
        Timing(**{name: 0})


def test_an_unknown_profile():
    with pytest.raises(ValueError, match="profile: expected relative or absolute, got 'strict'"):
        export_rules("strict")


def test_amtool_accepts_the_inhibition_rules(tmp_path):
    text = export_alertmanager()
    (tmp_path / "alertmanager.yml").write_text(f"route: {{receiver: all}}\nreceivers: [{{name: all}}]\n{text}")
    amtool = binary("prometheus-alertmanager", "usr/bin/amtool")
    command = [amtool, "check-config", "alertmanager.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(yaml.safe_load(text)['inhibit_rules'])} inhibit rules" in done.stdout


def test_no_alert_silences_the_call_for_a_human():
    """It is critical and an alert of its own: while its layer has collapsed, it is no symptom of that."""
    labels = {"alertname": "EquipoiseMonitorAlert", "rule": "recovery_exhausted", "severity": "critical", "layer": "a"}
    symptom = labels | {"rule": "drops"}
    silenced = [_matches(rule["target_matchers"], labels) for rule in inhibit_rules()]
    assert not any(silenced)
    assert any(_matches(rule["target_matchers"], symptom) for rule in inhibit_rules())
    # the same from the sink that talks to Alertmanager itself
    named = labels | {"alertname": "EquipoiseRecoveryExhausted"}
    assert not any(_matches(rule["target_matchers"], named) for rule in inhibit_rules())


def _matches(matchers, labels):
    """As Alertmanager reads them: patterns are of the whole value, and a label that is missing is empty."""
    tests = {
        "=": lambda text, value: text == value,
        "!=": lambda text, value: text != value,
        "=~": lambda text, value: re.fullmatch(value, text) is not None,
        "!~": lambda text, value: re.fullmatch(value, text) is None,
    }
    parsed = (re.fullmatch(r'(\w+)(=~|!~|!=|=)"(.*)"', matcher).groups() for matcher in matchers)
    return all(tests[operator](labels.get(label, ""), value) for label, operator, value in parsed)


def test_inhibition_is_about_alerts_that_exist():
    names = {rule.name for profile in PROFILES for rule in alert_rules(profile, Timing())}
    for rule in yaml.safe_load(export_alertmanager())["inhibit_rules"]:
        for matcher in rule["source_matchers"] + rule["target_matchers"]:
            label, operator, pattern = re.fullmatch(r'(\w+)(=~|!~|!=|=)"(.*)"', matcher).groups()
            if label == "alertname" and operator in ("=", "=~"):
                assert any(re.fullmatch(pattern, name) for name in names), matcher
        assert {"run", "layer"} <= set(rule["equal"])
