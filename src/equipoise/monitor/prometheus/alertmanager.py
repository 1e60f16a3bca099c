"""Inhibition rules for Alertmanager: one page for a collapsed layer, not one for each of its symptoms.

What to put under `inhibit_rules:` in alertmanager.yml. Routes and receivers are the user's. Group by [run, layer], and
also by rule where a receiver pages once per group: when no repair is left, that is a page of its own.
"""

from __future__ import annotations

from equipoise.monitor.alert_names import RULES, alert_name
from equipoise.monitor.incidents import EXHAUSTED
from equipoise.monitor.prometheus.yaml_text import to_yaml

_NO_SYMPTOM = f'rule!~"collapse|{EXHAUSTED}"'  # that no repair is left is no symptom: it calls a human
_SAME_LAYER = ["instance", "replica", "run", "layer"]  # of one target; where neither alert has a label, it is equal
_COLLAPSED = "|".join(map(alert_name, ("collapse", "utilisation_high")))
_DEAD, _DROPS = alert_name("dead_experts"), alert_name("drops")
_TWINS = (("drops",), ("logits", "logit_std"), ("dead_experts",))  # rules whose alerts Prometheus finds, too


def export_alertmanager() -> str:
    """YAML text with the key inhibit_rules, for both profiles."""
    return to_yaml({"inhibit_rules": inhibit_rules()})


def inhibit_rules() -> list[dict[str, list[str]]]:
    """Sources silence targets about the same layer of the same process; an inhibited source still silences."""
    return [
        # the monitor says that a layer has collapsed: all else about the layer is a symptom, or says the same later
        _rule(
            ['alertname="EquipoiseMonitorAlert"', 'rule="collapse"'],
            ['alertname=~"Equipoise.*"', 'layer!=""', _NO_SYMPTOM],
        ),
        # so does Prometheus
        _rule(
            [f'alertname=~"{_COLLAPSED}"'],
            [
                'alertname=~"Equipoise.*"',
                f'alertname!~"{_COLLAPSED}"',
                'layer!=""',
                _NO_SYMPTOM,
            ],
        ),
        *(
            _rule(
                ['alertname="EquipoiseMonitorAlert"', f'rule=~"{"|".join(rules)}"'],
                [f'alertname=~"{"|".join(name for name, rule in RULES.items() if rule in rules)}"'],
                [*_SAME_LAYER, "severity"],
            )
            for rules in _TWINS
        ),
        # a layer's alert silences those about its experts
        _rule([f'alertname="{_DEAD}"'], ['alertname="EquipoiseExpertCold"']),
        _rule(['alertname="EquipoiseMonitorAlert"', 'rule="dead_experts"'], ['alertname="EquipoiseExpertCold"']),
        _rule([f'alertname="{alert_name("entropy")}"'], [f'alertname="{alert_name("entropy_target")}"']),
        # of one alert at several severities the highest counts
        _rule(
            ['severity="critical"'],
            [f'alertname="{_DROPS}"', 'severity=~"warning|info"'],
            [*_SAME_LAYER, "alertname"],
        ),
        _rule(['severity="warning"'], [f'alertname="{_DROPS}"', 'severity="info"'], [*_SAME_LAYER, "alertname"]),
    ]


def _rule(source: list[str], target: list[str], equal: list[str] | None = None) -> dict[str, list[str]]:
    return {"source_matchers": source, "target_matchers": target, "equal": equal or _SAME_LAYER}
