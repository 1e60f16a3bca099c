"""What these tests share: flushes with given loads, a scrape as a dictionary, and the programs of Prometheus."""

import json
import math
import subprocess

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.monitor.debian import binary

from equipoise.monitor.prometheus.collector import RoutingCollector
from equipoise.monitor.prometheus.rules import export_rules
from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.types import Alert, Finding

NUM_TOKENS = 4096


def window(layer="blocks.0", step=50, counts_E=(600, 400, 500, 548), *, num_tokens=1024, **changes):
    """One layer's record. logit_std and logsumexp are the record's; dropped and rerouted are by reason."""
    counts_E = np.asarray(counts_E, dtype=np.int64)
    E, std, lse = len(counts_E), changes.pop("logit_std", 2.0), changes.pop("logsumexp", 4.0)
    sums = RoutingSums(
        num_tokens=num_tokens,
        counts_E=counts_E,
        probs_sum_E=np.full(E, num_tokens / E),
        token_entropy_sum=0.5 * num_tokens * math.log(E),
        logit_sum=0.0,
        logit_sq_sum=num_tokens * E * std**2,
        logsumexp_sum=num_tokens * lse,
        dropped=changes.pop("dropped", {"capacity": 0, "hard_cap": 0, "tokens": 0}),
        rerouted=changes.pop("rerouted", {}),
        losses=changes.pop("losses", {}),
    )
    assert not changes, changes
    return routing_stats(layer, step, sums)


def alert(rule="collapse", layer="blocks.0", state="firing", severity="critical", step=100):
    finding = Finding(rule, layer, None, severity, 0.9, 0.5, f"{layer}: {rule}", "repair it")
    return Alert(f"{layer}:{rule}", state, step, step, finding)


class Fixed:
    """A source that always has the same picture."""

    def __init__(self, snapshot):
        self.snapshot = snapshot

    def read(self):
        return self.snapshot


def exposition(source, **options):
    """The text of one scrape."""
    registry = CollectorRegistry()
    registry.register(RoutingCollector(source, **options))
    return generate_latest(registry).decode()


def samples(text):
    """(name, labels as sorted pairs) -> value. Every series once."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"twice in one scrape: {key}"
            found[key] = sample.value
    return found


def scrape(source, **options):
    return samples(exposition(source, **options))


def value(scraped, name, **labels):
    """Of the one series with that name and at least those labels."""
    [found] = [v for (n, pairs), v in scraped.items() if n == name and labels.items() <= dict(pairs).items()]
    return found


def names(scraped):
    return {name for name, _ in scraped}


def promtool():
    return binary("prometheus", "usr/bin/promtool")


def run_promtool(folder, profile, tests):
    """promtool's unit tests of the exported rules of a profile."""
    (folder / "rules.yml").write_text(export_rules(profile))
    data = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests}
    (folder / "test.yml").write_text(json.dumps(data))
    command = [promtool(), "test", "rules", "test.yml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
