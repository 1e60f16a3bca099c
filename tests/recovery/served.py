"""A model that is served under a recovery, in one thread: a forward, a flush and a look per step."""

from dataclasses import dataclass, field

import torch

from equipoise.faults import Collapse, inject
from equipoise.monitor.baseline import baselines_of
from equipoise.monitor.watch import Watch
from equipoise.recovery.actions import Patient
from equipoise.recovery.canary import Canary
from equipoise.recovery.dense_path import build_dense_paths
from equipoise.recovery.known_good import KnownGood
from equipoise.recovery.recent import RecentScores
from equipoise.recovery.recovery import Recovery
from equipoise.recovery.router_state import router_state
from equipoise.recovery.swap import swap

LAYER, OTHER = "layers.1.mlp", "layers.0.mlp"


@dataclass
class Notebook:
    """A sink that keeps what it gets."""

    alerts: list = field(default_factory=list)
    actions: list = field(default_factory=list)

    def routing(self, window):
        pass

    def alert(self, alert):
        self.alerts.append((alert.key, alert.state))

    def action(self, action):
        self.actions.append(action)

    @property
    def story(self):
        return [(action.kind, action.state) for action in self.actions]


class Server:
    """A model that is served: a forward, a flush and a look of the recovery per step."""

    def __init__(self, bench, tmp_path, *, known_good=True, training=None, **options):
        self.bench, self.model, self.step, self.notes = bench, bench.model, 0, Notebook()
        self.model.train(training is not None)
        self.watch = Watch(self.model, every=1, sinks=(self.notes,))
        self.canary = Canary(self.model, bench.held_out_loss)
        with self.watch.recorder.paused():
            self.healthy = self.canary.measure(0)
        self.registry = KnownGood(tmp_path) if known_good else None
        if known_good:
            baselines = baselines_of(self.healthy.stats.values())
            self.registry.put(
                step=0, tensors=router_state(self.model), baselines=baselines, loss=self.healthy.loss, checkpoint="c"
            )
        whole = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        counts = {name: stats.counts_E for name, stats in self.healthy.stats.items()}
        layers = self.model.moe_layers
        with self.watch.recorder.paused():
            dense = build_dense_paths(layers, counts, bench.held_out_loss)
        recent = RecentScores(layers, 2048)
        patient = Patient(
            self.model,
            layers,
            recent=recent,
            known_good=self.registry,
            dense=dense,
            reload=lambda name: swap(self.model, whole, whole=True).undo,
            training=training,
        )
        options = {"act": True, "canary": self.canary, "sinks": (self.notes,)} | options
        self.recovery = Recovery(patient, quiet=self.watch.recorder.paused, **options)

    def run(self, steps, seed=None):
        """The actions of each step; seed: the same traffic every time."""
        for _ in range(steps):
            self.step += 1
            self.bench.serve(self.step if seed is None else seed)
            changed = self.watch.step(self.step)
            self.recovery.after_flush(self.step, self.watch.alerts, self.watch.stats(), changed)

    def collapse(self, layer=LAYER, expert=5, intensity=40.0):
        with self.watch.recorder.paused():
            return inject(self.model, Collapse(layer, expert, intensity), lambda: self.bench.serve(0))

    def violation(self, layer=LAYER):
        return next(stats.max_violation for stats in self.watch.stats() if stats.layer == layer)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
