"""The live source: totals under a monitor, from several threads, in bounded memory."""

import threading
from dataclasses import asdict

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from tests.monitor.prometheus.cases import alert, samples, scrape, value, window
from torch import nn

from equipoise.layer import MoE
from equipoise.monitor.prometheus.collector import RoutingCollector
from equipoise.monitor.prometheus.live import LiveSource
from equipoise.monitor.watch import watch
from equipoise.routing import TopK
from equipoise.types import Action


def test_under_a_monitor_the_totals_are_all_tokens_of_all_layers():
    torch.manual_seed(0)
    model = nn.Sequential(MoE(8, 8, 4, router=TopK(k=2)), MoE(8, 8, 4, router=TopK(k=2)))
    source, flushed = LiveSource("run"), []
    with watch(model, every=2, sinks=[source]) as eye:
        for step in range(1, 7):
            model(torch.randn(50, 8))
            eye.step(step)
            flushed += eye.stats() if step % 2 == 0 else []
    scraped = scrape(source, detail="expert")
    for layer in ("0", "1"):
        assert value(scraped, "equipoise_layer_tokens_total", layer=layer) == 300
        counts = [
            value(scraped, "equipoise_expert_assignments_total", layer=layer, expert=str(expert)) for expert in range(4)
        ]
        assert counts == sum(stats.counts_E for stats in flushed if stats.layer == layer).tolist()
        assert sum(counts) == 600
    assert value(scraped, "equipoise_last_flush_step") == 6
    assert value(scraped, "equipoise_flushes_total") == 3
    assert value(scraped, "equipoise_monitor_seconds_total", part="sink") > 0


def test_an_alert_fires_until_it_is_resolved():
    source = LiveSource("run")
    source.alert(alert())
    source.alert(alert())  # again: a resumed run may say so twice
    assert [each.key for each in source.read().firing] == ["blocks.0:collapse"]
    source.alert(alert(state="resolved"))
    assert source.read().firing == ()
    assert source.read().fired == {("collapse", "critical"): 2}


def test_a_resumed_run_says_which_alerts_fire_already():
    source = LiveSource("run", firing=[alert()])
    assert [each.key for each in source.read().firing] == ["blocks.0:collapse"]
    assert source.read().fired == {}


def test_the_end_of_a_run():
    source = LiveSource("run")
    assert value(scrape(source), "equipoise_run_running") == 1
    source.close()
    assert value(scrape(source), "equipoise_run_running") == 0


def test_what_a_loop_measured_itself():
    source = LiveSource("run")
    source.spent("record", 0.25)
    source.spent("record", 0.5)
    assert value(scrape(source), "equipoise_monitor_seconds_total", part="record") == 0.75


def test_a_picture_does_not_change_afterwards():
    source = LiveSource("run")
    source.routing([window()])
    before = source.read()
    kept = asdict(before.layers["blocks.0"])
    source.routing([window()])
    after = before.layers["blocks.0"]
    assert (after.num_tokens, after.counts_E.tolist()) == (1024, kept["counts_E"].tolist())
    assert (before.num_flushes, len(before.layers)) == (1, 1)


def test_a_sink_does_not_keep_the_callers_array():
    source, stats = LiveSource("run"), window()
    source.routing([stats])
    stats.counts_E[0] = 0
    assert source.read().layers["blocks.0"].counts_E.tolist() == [600, 400, 500, 548]


def test_another_number_of_experts_is_another_layer():
    """A counter that falls is what Prometheus takes for a restart; sums of both would be neither."""
    source = LiveSource("run")
    source.routing([window(counts_E=(1, 2, 3, 4))])
    source.routing([window(counts_E=(5, 6))])
    assert source.read().layers["blocks.0"].counts_E.tolist() == [5, 6]


def test_memory_is_bounded():
    source = LiveSource("run", max_keys=3)
    for number in range(10):
        source.routing([window(f"blocks.{number}")])
        source.alert(alert(f"rule {number}"))
        source.action(Action(f"kind {number}", "blocks.0", 1, "why"))
        source.spent(f"part {number}", 1.0)
    seen = source.read()
    assert list(seen.layers) == ["blocks.0", "blocks.1", "blocks.2"]
    assert (len(seen.firing), len(seen.fired), len(seen.actions), len(seen.seconds)) == (3, 3, 3, 3)
    assert seen.num_ignored == 7 + 7 + 7 + 7 + 8  # layers, alerts, rules, kinds; "sink" is a part already
    assert value(scrape(source), "equipoise_ignored_names_total") == seen.num_ignored
    source.routing([window("blocks.1")])  # a known one still counts
    assert source.read().layers["blocks.1"].num_tokens == 2048


def test_max_keys_is_checked():
    with pytest.raises(ValueError, match="max_keys: expected at least 1, got 0"):
        LiveSource("run", max_keys=0)


class Scraper(threading.Thread):
    """Scrapes until told to stop, and once more."""

    def __init__(self, source):
        super().__init__()
        self.registry, self.stop, self.texts = CollectorRegistry(), threading.Event(), []
        self.registry.register(RoutingCollector(source, detail="expert"))
        self.start()

    def run(self):
        last = False
        while not last:
            last = self.stop.is_set()
            self.texts.append(generate_latest(self.registry).decode())

    def finish(self):
        self.stop.set()
        self.join()
        return self.texts


def test_scrapes_and_flushes_at_the_same_time():
    """Each flush adds the same to every series: any scrape that mixed two moments would show different totals."""
    source, num_flushes = LiveSource("run"), 100
    flush = [window(f"blocks.{i}", counts_E=np.ones(8), num_tokens=4) for i in range(6)]

    def write():
        for _ in range(num_flushes):
            source.routing(flush)
            source.alert(alert())
            source.alert(alert(state="resolved"))

    scrapers, writers = [Scraper(source) for _ in range(2)], [threading.Thread(target=write) for _ in range(2)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    for scraper in scrapers:
        texts = scraper.finish()
        for scraped in map(samples, texts):
            flushes = value(scraped, "equipoise_flushes_total")
            for name, each in (("expert_assignments", 1), ("layer_tokens", 4), ("layer_assignments", 8)):
                numbers = {v for (series, _), v in scraped.items() if series == f"equipoise_{name}_total"}
                assert numbers in ({each * flushes}, set())
        assert flushes == 2 * num_flushes  # of the last one
