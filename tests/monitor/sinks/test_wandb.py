"""The sink for Weights & Biases, with an object of the same shape, and with the real library where it is installed."""

import pytest
from tests.monitor.sinks.cases import alert, repair, stats

from equipoise.monitor.sinks.wandb import WandB


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
    sink.action(repair(step=60, detail={"max_violation": 2.5}))
    sink.action(repair("undone", step=80, note="loss <rose>"))


def test_what_is_logged():
    run = Run()
    feed(WandB(run, name="run 7"))
    assert run.metrics == [("routing/step", None), ("routing/*", "routing/step"), ("repairs/*", "routing/step")]
    window, applied, undone = run.logged
    assert window["routing/step"] == 50
    assert window["routing/blocks.3.moe/max_violation"] == window["routing/blocks.4.moe/max_violation"] == 0.875
    place = "repairs/blocks.3.moe/quantile_bias"
    assert applied == {"routing/step": 60, f"{place}/applied": 1, f"{place}/max_violation": 2.5}
    assert undone == {
        "routing/step": 80,
        f"{place}/undone": 1,
        f"{place}/steps": 0.0,
        f"{place}/note": "loss &lt;rose&gt;",
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
