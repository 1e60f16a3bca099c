"""One name per alert, whoever says it."""

import pytest
from tests.monitor.prometheus.cases import window

from equipoise.monitor.alert_names import RULES, alert_name, anchor_of
from equipoise.monitor.detectors import CollapseDetector
from equipoise.monitor.rules import AbsoluteRule
from equipoise.recovery.policy import SERVING_RUNGS, TRAINING_RUNGS


@pytest.mark.parametrize(
    ("rule", "severity", "name"),
    [
        ("collapse", "critical", "EquipoiseLayerCollapse"),
        ("dead_experts", "warning", "EquipoiseDeadExperts"),
        ("drops", "info", "EquipoiseDropRate"),
        ("logits", "critical", "EquipoiseLogitBlowUp"),
        ("logits", "warning", "EquipoiseLogitStdDrift"),
        ("entropy", "critical", "EquipoiseEntropyLow"),
        ("my own-rule", "warning", "EquipoiseMyOwnRule"),
        ("", "warning", "Equipoise"),
    ],
)
def test_names(rule, severity, name):
    assert alert_name(rule, severity) == name
    assert anchor_of(name) == name.lower()


def test_the_way_back():
    for name, rule in RULES.items():
        assert name in {alert_name(rule, severity) for severity in ("critical", "warning")}


def test_what_is_found_and_repaired_has_a_name_in_the_table():
    """Of all that detectors say about a layer in which one expert takes everything, under both profiles."""
    broken = [window(counts_E=[4000, 0, 0, 0, 0, 0, 0, 0], num_tokens=4000)]
    found = {each.rule for each in [*CollapseDetector()(broken), *AbsoluteRule()(broken)]}
    assert {"collapse", "dead_experts", "utilisation_low", "one_bin"} <= found
    assert found | TRAINING_RUNGS.keys() | SERVING_RUNGS.keys() <= set(RULES.values())
