"""The sink for Weights & Biases, with an object of the same shape, and with the real library where it is installed."""

import pytest
from tests.monitor.sinks.cases import alert, stats

from equipoise.monitor.sinks.wandb import WandB
from equipoise.types import Action


class Run:
    def __init__(self):
        self.metrics, self.logged, self.alerts = [], [], []

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, data):
        self.logged.append(data)

    def alert(self, title, text, level=None):
        self.alerts.append((title, text, level))


def feed(sink):
    sink.routing([stats(), stats("blocks.4.moe")])
    sink.routing([])
    sink.alert(alert(message="<b>hot</b>"))
    sink.alert(alert("resolved"))
    sink.action(Action("quantile_bias", "blocks.3.moe", 60, "blocks.3.moe:collapse", {"max_violation": 2.5}))


def test_what_is_logged():
    run = Run()
    feed(WandB(run, name="run 7"))
    assert run.metrics == [("routing/step", None), ("routing/*", "routing/step"), ("repairs/*", "routing/step")]
    window, repair = run.logged
    assert window["routing/step"] == 50
    assert window["routing/blocks.3.moe/max_violation"] == window["routing/blocks.4.moe/max_violation"] == 0.875
    assert repair == {
        "routing/step": 60,
        "repairs/blocks.3.moe/quantile_bias": 1,
        "repairs/blocks.3.moe/quantile_bias/max_violation": 2.5,
    }
    fired, over = run.alerts
    assert fired[0] == "Firing: run 7: collapse in blocks.3.moe, expert 5"
    assert fired[1].startswith("&lt;b&gt;hot&lt;/b&gt; What to do: ")
    assert (fired[2], over[2]) == ("ERROR", "INFO")


@pytest.mark.filterwarnings("default")
def test_with_the_real_library_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="p", settings=wandb.Settings(console="off"))
    feed(WandB(run, name="run 7"))
    assert run.summary["routing/blocks.3.moe/max_violation"] == 0.875
    run.finish()
