"""What is exported: numbers equal to the record's, legal names, hostile labels, and a budget that degrades visibly."""

import math
import re
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from tests.monitor.prometheus.cases import Fixed, alert, exposition, names, promtool, samples, scrape, value, window

from equipoise.monitor.baseline import baselines_of
from equipoise.monitor.prometheus.collector import RoutingCollector
from equipoise.monitor.prometheus.live import LiveSource
from equipoise.monitor.prometheus.source import LayerTotals, Snapshot
from equipoise.types import Action

DROPPED = {"capacity": 30, "hard_cap": 2, "tokens": 5}


def two_flushes(**options):
    source = LiveSource("run", clock=lambda: 1_700_000_000.5, **options)
    source.routing([window("blocks.0", 50, dropped=DROPPED, rerouted={"moved": 7}), window("blocks.1", 50)])
    last = [
        window("blocks.0", 100, (0, 1024, 512, 512), dropped=DROPPED, losses={"switch": 1.25}, logit_std=3.0),
        window("blocks.1", 100, (256, 256, 512, 1024), num_tokens=2048, logsumexp=9.0),
    ]
    source.routing(last)
    return source, last


def test_gauges_are_the_newest_record():
    source, last = two_flushes()
    scraped = scrape(source, baselines=baselines_of(last[:1]))
    for stats in last:
        expected = {
            "experts": 4,
            "window_tokens": stats.num_tokens,
            "window_assignments": 2048,
            "load_entropy_ratio": stats.load_entropy,
            "token_entropy_ratio": stats.token_entropy,
            "marginal_entropy_ratio": stats.marginal_entropy,
            "mutual_information_nats": stats.mutual_information,
            "max_violation_ratio": stats.max_violation,
            "min_load_ratio": stats.min_load,
            "load_cv_ratio": stats.load_cv,
            "gini_ratio": stats.gini,
            "effective_experts": stats.effective_experts,
            "dead_experts": len(stats.dead_experts),
            "max_token_share_ratio": stats.max_token_share,
            "logit_mean": stats.logit_mean,
            "logit_std": stats.logit_std,
            "logit_logsumexp": stats.logit_logsumexp,
        }
        for name, number in expected.items():
            assert value(scraped, f"equipoise_layer_{name}", run="run", layer=stats.layer) == number, name
    assert value(scraped, "equipoise_layer_dead_experts", layer="blocks.0") == 1
    assert value(scraped, "equipoise_layer_max_violation_ratio", layer="blocks.0") == 1.0  # 1024 of 2048 over 1/4
    assert value(scraped, "equipoise_layer_balance_loss", layer="blocks.0", loss="switch") == 1.25 / 1024
    assert value(scraped, "equipoise_layer_baseline_logit_std", layer="blocks.0") == pytest.approx(3.0)


def test_counters_are_sums_over_all_flushes():
    scraped = scrape(two_flushes()[0], detail="expert")
    experts = [value(scraped, "equipoise_expert_assignments_total", layer="blocks.0", expert=str(e)) for e in range(4)]
    assert experts == [600, 1424, 1012, 1060]
    for layer, tokens in (("blocks.0", 2048), ("blocks.1", 3072)):
        assert value(scraped, "equipoise_layer_tokens_total", layer=layer) == tokens
        assert value(scraped, "equipoise_layer_assignments_total", layer=layer) == 4096
    by_reason = {"capacity": 60, "hard_cap": 4}
    for reason, count in by_reason.items():
        assert value(scraped, "equipoise_layer_dropped_assignments_total", layer="blocks.0", reason=reason) == count
        assert value(scraped, "equipoise_layer_dropped_assignments_total", layer="blocks.1", reason=reason) == 0
        assert value(scraped, "equipoise_dropped_assignments_total", reason=reason) == count
    assert value(scraped, "equipoise_layer_dropped_tokens_total", layer="blocks.0") == 10
    assert value(scraped, "equipoise_dropped_tokens_total") == 10
    assert value(scraped, "equipoise_layer_rerouted_assignments_total", layer="blocks.0", reason="moved") == 7
    assert value(scraped, "equipoise_rerouted_assignments_total", reason="spilled") == 0


def test_the_summary_has_the_worst_layer():
    source, last = two_flushes()
    scraped = scrape(source, detail="summary")
    assert not [name for name in names(scraped) if name.startswith(("equipoise_layer_", "equipoise_expert_"))]
    assert value(scraped, "equipoise_layers") == 2
    assert value(scraped, "equipoise_routed_tokens_total") == 2048 + 3072
    assert value(scraped, "equipoise_assignments_total") == 4 * 2048
    assert value(scraped, "equipoise_worst_load_entropy_ratio") == min(stats.load_entropy for stats in last)
    assert value(scraped, "equipoise_worst_max_violation_ratio") == 1.0
    assert value(scraped, "equipoise_worst_max_token_share_ratio") == 1.0
    assert value(scraped, "equipoise_worst_logit_logsumexp") == 9.0
    assert value(scraped, "equipoise_worst_effective_experts_ratio") == last[0].effective_experts / 4
    assert value(scraped, "equipoise_dead_experts") == 1
    assert value(scraped, "equipoise_last_flush_timestamp_seconds", run="run") == 1_700_000_000.5
    assert value(scraped, "equipoise_last_flush_step") == 100
    assert value(scraped, "equipoise_flushes_total") == 2
    assert value(scraped, "equipoise_build_info") == 1


LADDER = [
    *[("quantile_bias", "applied"), ("quantile_bias", "undone")] * 2,
    *[("reseed", "failed"), ("spill", "applied"), ("spill", "kept"), ("look_at_input", "proposed")],
]


def test_alerts_and_repairs():
    source, _ = two_flushes()
    for each in (alert(), alert("drops", severity="info"), alert("drops", state="resolved"), alert("drops")):
        source.alert(each)
    for kind, state in LADDER:
        source.action(Action(kind, "blocks.0", 100, "blocks.0:collapse", state=state))
    scraped = scrape(source, detail="summary")
    firing = {dict(labels)["rule"]: dict(labels) for name, labels in scraped if name == "equipoise_alert_firing"}
    assert firing == {
        "collapse": {"run": "run", "layer": "blocks.0", "rule": "collapse", "severity": "critical"},
        "drops": {"run": "run", "layer": "blocks.0", "rule": "drops", "severity": "critical"},
    }
    assert value(scraped, "equipoise_alerts_fired_total", rule="drops", severity="info") == 1
    assert value(scraped, "equipoise_alerts_fired_total", rule="drops", severity="critical") == 1
    counted = {
        (dict(labels)["kind"], dict(labels)["result"]): number
        for (name, labels), number in scraped.items()
        if name == "equipoise_actions_total"
    }
    assert counted == {
        ("quantile_bias", "applied"): 2,
        ("quantile_bias", "undone"): 2,
        ("spill", "applied"): 1,
        ("spill", "kept"): 1,
        ("reseed", "failed"): 1,
        ("look_at_input", "proposed"): 1,
    }


def test_before_the_first_flush_there_is_nothing_to_say_about_balance():
    scraped = scrape(LiveSource("run"), detail="expert")
    assert value(scraped, "equipoise_layers") == 0
    assert value(scraped, "equipoise_flushes_total") == 0
    assert not names(scraped) & {"equipoise_last_flush_timestamp_seconds", "equipoise_worst_load_entropy_ratio"}


def test_what_is_not_known_is_left_out():
    """Records of other programs have no logits, and a flush without tokens would look perfectly even."""
    unknown = replace(window("a"), logit_std=math.nan, logit_logsumexp=math.inf)
    empty = window("b", counts_E=(0, 0, 0, 0), num_tokens=0)
    scraped = scrape(Fixed(Snapshot("run", {s.layer: LayerTotals.of(s) for s in (unknown, empty)})))
    assert "equipoise_layer_logit_std" not in names(scraped)
    assert value(scraped, "equipoise_layer_logit_logsumexp") == math.inf  # of a only
    assert value(scraped, "equipoise_layer_load_entropy_ratio") == unknown.load_entropy
    assert value(scraped, "equipoise_layer_window_tokens", layer="b") == 0
    assert value(scraped, "equipoise_worst_load_entropy_ratio") == unknown.load_entropy


def test_counts_beyond_32_bits_stay_exact():
    source = LiveSource("run")
    for _ in range(3):
        source.routing([window(counts_E=(2**51, 1, 0, 0))])
    scraped = scrape(source, detail="expert")
    assert value(scraped, "equipoise_expert_assignments_total", expert="0") == 3 * 2**51
    assert value(scraped, "equipoise_expert_assignments_total", expert="1") == 3


# ------------------------------------------------------------------------------------------------------- the format


def test_names_follow_the_conventions():
    text = exposition(two_flushes()[0], detail="expert", baselines=baselines_of([window()]))
    found = names(samples(text))
    assert all(re.fullmatch(r"equipoise_[a-z0-9_]+", name) for name in found), found
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    assert types.keys() == helps.keys()
    assert all(name.endswith("_total") == (kind == "counter") for name, kind in types.items())
    assert all(len(text) > 10 and text.endswith(".") for text in helps.values())
    labels = {name for _, pairs in samples(text) for name, _ in pairs}
    known = {"run", "layer", "expert", "reason", "rule", "severity", "loss", "part", "kind", "result"}
    assert labels <= known | {"version", "python", "requested", "effective"}


def test_promtool_finds_nothing_to_criticise():
    source, _ = two_flushes()
    source.alert(alert())
    source.action(Action("quantile_bias", "blocks.0", 100, "why"))
    text = exposition(source, detail="expert", baselines=baselines_of([window()]))
    done = subprocess.run([promtool(), "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_openmetrics_too():
    """What Prometheus asks for when it scrapes; its parser is the stricter one."""
    registry = CollectorRegistry()
    registry.register(RoutingCollector(two_flushes()[0], detail="expert"))
    families = {family.name: family for family in parse_openmetrics(generate_openmetrics(registry).decode())}
    assert families["equipoise_expert_assignments"].type == "counter"
    assert families["equipoise_build"].type == "info"


HOSTILE = ['a"b', "a\\", "a\nb", 'a\\"} 1\nevil{x="', "ü🙂", "a{b}", "", " ", "a\x00b", "a\rb", "half \udc80", "#"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_values(name):
    source = LiveSource(name)
    source.routing([window(name), window("blocks.1")])
    source.alert(alert(rule=name, layer=name))
    source.action(Action(name, name, 1, name))
    text = exposition(source, detail="expert")
    scraped = samples(text)
    expected = name.replace("\x00", "\\x00").replace("\r", "\\x0d").replace("\udc80", "\\udc80")
    assert value(scraped, "equipoise_layer_tokens_total", layer=expected, run=expected) == 1024
    assert value(scraped, "equipoise_alert_firing", layer=expected, rule=expected) == 1
    assert all(series.startswith("equipoise_") for series in names(scraped))
    done = subprocess.run([promtool(), "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@given(st.lists(st.text(max_size=8), min_size=1, max_size=4, unique=True))
def test_any_text_can_be_a_layer(layers):
    source = LiveSource("run")
    source.routing([window(layer) for layer in layers])
    scraped = scrape(source)
    tokens = [number for (name, _), number in scraped.items() if name == "equipoise_layer_tokens_total"]
    assert tokens == [1024] * len(layers)


# -------------------------------------------------------------------------------------------------------- the budget


def large(num_layers=61, num_experts=256):
    source = LiveSource("run")
    source.routing([window(f"blocks.{i}", counts_E=np.full(num_experts, 32)) for i in range(num_layers)])
    return source


def level(scraped):
    [labels] = [dict(pairs) for name, pairs in scraped if name == "equipoise_detail_info"]
    return labels["requested"], labels["effective"]


@pytest.mark.parametrize(
    ("detail", "max_series", "effective", "dropped"),
    [
        ("expert", 20_000, "expert", 0),
        ("expert", 10_000, "layer", 61 * 256),
        ("expert", 500, "summary", None),
        ("layer", 10_000, "layer", 0),
        ("layer", 500, "summary", None),
        ("summary", 100, "summary", 0),
    ],
)
def test_61_layers_of_256_experts(detail, max_series, effective, dropped):
    source = large()
    scraped = scrape(source, detail=detail, max_series=max_series)
    assert level(scraped) == (detail, effective)
    assert value(scraped, "equipoise_series") == len(scraped) <= max_series
    assert value(scraped, "equipoise_series_limit") == max_series
    per_layer = 3 + 14 + 2 + 2 + 1 + 3  # sizes, gauges, totals, drops and tokens by reason, reroutes
    layers = [name for name, pairs in scraped if dict(pairs).get("layer") == "blocks.7" and "expert" not in dict(pairs)]
    assert len(layers) == (0 if effective == "summary" else per_layer)
    if dropped is None:
        dropped = 61 * per_layer + (61 * 256 if detail == "expert" else 0)
    assert value(scraped, "equipoise_series_dropped") == dropped


def test_a_level_that_just_fits():
    source = large(2, 16)
    everything = len(scrape(source, detail="expert"))
    assert everything > 100  # the least budget
    for max_series, effective in ((everything, "expert"), (everything - 1, "layer")):
        scraped = scrape(source, detail="expert", max_series=max_series)
        assert level(scraped)[1] == effective
        assert len(scraped) <= max_series
    assert value(scraped, "equipoise_series_dropped") == 32


def test_alerts_come_before_layers_and_critical_ones_first():
    source = LiveSource("run")
    source.routing([window(f"blocks.{i}") for i in range(100)])
    for i in range(100):
        source.alert(alert("drops", f"blocks.{i}", severity="info"))
    for i in range(20):
        source.alert(alert("collapse", f"blocks.{i}"))
    scraped = scrape(source, max_series=120)
    rules = [dict(pairs)["rule"] for name, pairs in scraped if name == "equipoise_alert_firing"]
    assert rules.count("collapse") == 20
    assert 0 < rules.count("drops") < 100
    assert level(scraped)[1] == "summary"
    assert len(scraped) == value(scraped, "equipoise_series") == 120
    missing_alerts = 120 - len(rules) + 2  # and the two counters of fired alerts
    assert value(scraped, "equipoise_series_dropped") == 100 * 25 + missing_alerts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detail": "layers"}, "detail: expected summary, layer or expert, got 'layers'"),
        ({"max_series": 99}, "max_series: expected at least 100, which the summary needs, got 99; raise it"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RoutingCollector(LiveSource("run"), **options)


def test_two_collectors_in_one_registry_of_the_caller():
    """No global state: each is served where it was registered, and nowhere else."""
    registry, other = CollectorRegistry(), CollectorRegistry()
    registry.register(RoutingCollector(LiveSource("a")))
    other.register(RoutingCollector(LiveSource("b")))
    runs = [{s.labels.get("run") for f in r.collect() for s in f.samples} - {None} for r in (registry, other)]
    assert runs == [{"a"}, {"b"}]


def test_the_cost_of_scraping_is_exported():
    registry = CollectorRegistry()
    registry.register(RoutingCollector(large(4, 8)))
    labels = {"run": "run", "part": "collect"}
    spent = [registry.get_sample_value("equipoise_monitor_seconds_total", labels) for _ in range(3)]
    assert spent[0] == 0
    assert 0 < spent[1] < spent[2]
