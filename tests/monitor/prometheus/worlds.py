"""Fifty minutes of a run as Prometheus would see it: scrapes of the real exporter, as series for promtool.

Each world is in health for 12 minutes, then in its own trouble for 24, then in health again.
"""

import json
from dataclasses import dataclass, replace

import numpy as np
from tests.monitor.prometheus.cases import Fixed, alert, window

from equipoise.monitor.baseline import baselines_of
from equipoise.monitor.prometheus.collector import RoutingCollector
from equipoise.monitor.prometheus.live import LiveSource

MINUTES, BEGIN, END = 50, 12, 36
LAYER, JOB = "blocks.0", {"job": "equipoise", "instance": "127.0.0.1:9469"}
NUM_TOKENS, K = 4096, 2


def even(num_experts=8, top_k=K, seed=0):
    """The counts of a fair router, with the noise of chance."""
    return np.random.default_rng(seed).multinomial(NUM_TOKENS * top_k, np.full(num_experts, 1 / num_experts))


def shares(*parts, top_k=K):
    """Counts in these proportions."""
    parts = np.asarray(parts, dtype=float)
    return np.round(NUM_TOKENS * top_k * parts / parts.sum()).astype(np.int64)


@dataclass(frozen=True)
class World:
    """What is different from health between BEGIN and END.

    counts: of the layer's experts. record: changes of the record. firing: the monitor's own alerts. left: rules of
    findings that a repair has left. flushes: whether there are any. up, readable: of the exporter and its source.
    max_series: of the exporter, all the time. num_experts, top_k: in health.
    """

    counts: tuple | None = None
    record: tuple = ()
    firing: tuple = ()
    left: tuple = ()
    flushes: bool = True
    up: bool = True
    readable: bool = True
    max_series: int = 10_000
    num_experts: int = 8
    top_k: int = K
    running: bool = True


def series(world, detail, job=JOB):
    """promtool's input_series. job: the labels that Prometheus adds to those of the target."""
    history = list(_scrapes(world, detail))
    keys = dict.fromkeys(key for scraped in history for key in scraped)
    return [
        {"series": _selector(*key, job), "values": " ".join(_text(scraped.get(key)) for scraped in history)}
        for key in keys
    ]


def _scrapes(world, detail):
    source = LiveSource("run", clock=lambda: 60.0 * minute)
    healthy = replace(world, counts=None, record=(), firing=(), left=(), flushes=True, up=True, readable=True)
    for minute in range(MINUTES):
        now = world if BEGIN <= minute < END else healthy
        if now.flushes:
            counts = even(world.num_experts, world.top_k, seed=minute) if now.counts is None else now.counts
            source.routing([window(LAYER, minute, counts, num_tokens=NUM_TOKENS, **dict(now.record))])
        if minute in (BEGIN, END):
            for rule, severity in world.firing:
                source.alert(alert(rule, LAYER, "firing" if minute == BEGIN else "resolved", severity))
        source.left([alert(rule, LAYER).finding for rule in now.left])
        snapshot = replace(source.read(), readable=now.readable, running=world.running)
        normal = baselines_of([window(LAYER)])
        collector = RoutingCollector(Fixed(snapshot), detail=detail, max_series=world.max_series, baselines=normal)
        samples = (sample for family in collector.collect() for sample in family.samples)
        scraped = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}
        yield (scraped if now.up else {}) | {("up", ()): float(now.up)}


def _selector(name, pairs, job):
    labels = ",".join(f"{key}={json.dumps(text)}" for key, text in sorted({**dict(pairs), **job}.items()))
    return f"{name}{{{labels}}}"


def _text(number):
    if number is None:
        return "_"
    return {float("inf"): "Inf", float("-inf"): "-Inf"}.get(number, repr(number))
