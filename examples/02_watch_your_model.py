"""Watch the routers of your own model: exact statistics, an alert on collapse, a repair, and nothing left behind.

Run it with `python examples/02_watch_your_model.py`. It needs no data, and checks what it prints.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

import equipoise as eq
from equipoise.faults import Collapse, inject
from equipoise.layer import reduce_and_update
from equipoise.monitor.watch import watch
from equipoise.types import Action, Alert


class YourModel(nn.Module):
    """Any module with MoE layers somewhere in it."""

    def __init__(self) -> None:
        super().__init__()
        balance = (eq.SwitchLoss(coef=0.01), eq.QuantileBalance(on_demand=True))  # the second stands by for repairs
        self.first = eq.MoE(32, 64, 8, balance=balance)
        self.second = eq.MoE(32, 64, 8, balance=balance)

    def forward(self, x: Tensor) -> Tensor:
        """Two residual blocks."""
        x = x + self.first(functional.layer_norm(x, x.shape[-1:]))
        return x + self.second(functional.layer_norm(x, x.shape[-1:]))


class Printer:
    """A sink: an object that gets every window, every alert and every repair."""

    def routing(self, window: list[eq.RoutingStats]) -> None:
        """Print each layer's load, where 100 is fair."""
        loads = [f"{stats.layer} {(100 * stats.load_E).astype(int).tolist()}" for stats in window]
        print(f"step {window[0].step:3}: {', '.join(loads)}")

    def alert(self, alert: Alert) -> None:
        """Print what was found, or that it is over."""
        print(f"          {alert.state}: {alert.finding.message if alert.state == 'firing' else alert.key}")

    def action(self, action: Action) -> None:
        """Nothing: this script says itself what it repairs."""


if __name__ == "__main__":
    torch.manual_seed(0)
    model, x = YourModel(), torch.randn(8, 64, 32) + torch.randn(32)  # like hidden states, with a part in common
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    layers = {"first": model.first, "second": model.second}
    fired, resolved = [], []
    with watch(model, every=5, sinks=(Printer(),)) as eye:
        for step in range(1, 61):
            if step == 21:
                inject(model, Collapse("second", expert=3), run=lambda: model(x))
            functional.mse_loss(model(x), x.roll(1, dims=-1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            reduce_and_update(layers.values())
            for alert in eye.step(step):
                (fired if alert.state == "firing" else resolved).append(alert)
                if alert.state == "firing":
                    layers[alert.finding.layer].balancer.activate()  # 04_repair.py has a whole ladder of repairs
                    print(f"          repair: the balancer of {alert.finding.layer} is switched on")
        watched = model.eval()(x)
    assert [alert.key for alert in fired] == [alert.key for alert in resolved] == ["second:collapse"]
    assert not eye.alerts
    assert all(stats.counts_E.sum() == 5 * 8 * 64 * 2 for stats in eye.stats())  # steps, sequences, tokens, choices
    assert torch.equal(watched, model(x))  # bit-identical with and without the monitor
    print(f"fired at step {fired[0].step}, resolved at step {resolved[0].step}")
