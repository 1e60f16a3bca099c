"""The watch: windows, alerts and sinks, from live layers; and a model that does not notice."""

import json
import threading
from dataclasses import replace
from math import nan

import pytest
import torch
from torch import nn

from equipoise.layer import MoE
from equipoise.monitor.baseline import baselines_of
from equipoise.monitor.detectors import CollapseDetector
from equipoise.monitor.profiles import rules_of
from equipoise.monitor.rules import LogitRule
from equipoise.monitor.sinks.background import Background
from equipoise.monitor.watch import Watch, watch
from equipoise.routing import TopK
from equipoise.types import Action, Finding

D, E, K, T = 16, 8, 2, 512  # T K / E = 128 assignments per expert and forward: enough for an opinion


class Notebook:
    """A sink that writes down what it gets, in order."""

    def __init__(self):
        self.pages = []

    def routing(self, window):
        self.pages.append(("routing", [stats.layer for stats in window], window[0].step))

    def alert(self, alert):
        self.pages.append(("alert", alert.key, alert.state, alert.step))

    def action(self, action: Action):
        self.pages.append(("action", action.kind))


class Two(nn.Module):
    """Two layers that see the same tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = MoE(D, 8, E, router=TopK(k=K))
        self.second = MoE(D, 8, E, router=TopK(k=K))

    def forward(self, x):
        return self.first(x) + self.second(x)


@pytest.fixture
def model():
    return Two()


def inputs(num_tokens=T):
    """The first of the dimensions is the same for all tokens: a router can prefer an expert by it."""
    x = torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(2))
    x[:, 0] = 1.0
    return x


def prefer(layer, expert, by=20.0):
    with torch.no_grad():
        layer.router.weight[expert, 0] += by


def test_a_window_is_judged_when_it_is_complete(model):
    book = Notebook()
    with watch(model, every=3, sinks=[book]) as observer:
        assert observer.stats() == []
        for step in (1, 2, 3, 4):
            model(inputs())
            assert observer.step(step) == []
        assert [stats.layer for stats in observer.stats()] == ["first", "second"]
        assert [(stats.step, stats.num_tokens) for stats in observer.stats()] == [(3, 3 * T)] * 2
        observer.flush(4)
        assert [(stats.step, stats.num_tokens) for stats in observer.stats()] == [(4, T)] * 2
    assert book.pages == [("routing", ["first", "second"], 3), ("routing", ["first", "second"], 4)]


def test_collapse_fires_in_its_second_window_and_is_resolved(model):
    book = Notebook()
    observer = Watch(model, every=1, sinks=[book])
    seen = []
    for step in range(1, 9):
        if step == 2:
            prefer(model.second, expert=5)
        if step == 5:
            prefer(model.second, expert=5, by=-20.0)
        model(inputs())
        changed = observer.step(step)
        seen += [(alert.step, alert.state) for alert in changed]
        if step == 4:
            [alert] = observer.alerts
            assert (alert.key, alert.finding.layer, alert.finding.expert) == ("second:collapse", "second", 5)
            assert (alert.since_step, alert.step, alert.finding.value) == (2, 4, 1.0)
            assert "second has collapsed: expert 5 takes 100.0% of the tokens, fair is 25.0%" in alert.finding.message
    observer.detach()
    assert seen == [(3, "firing"), (6, "resolved")]
    assert observer.alerts == []
    alerts = [page for page in book.pages if page[0] == "alert"]
    assert alerts == [("alert", "second:collapse", "firing", 3), ("alert", "second:collapse", "resolved", 6)]
    assert len(book.pages) == 8 + 2


def test_too_few_tokens_are_no_opinion(model):
    """100 assignments per expert are needed: 64 tokens give 16."""
    prefer(model.second, expert=5)
    observer = Watch(model, every=1)
    for step in range(1, 6):
        model(inputs(64))
        assert observer.step(step) == []
    observer.detach()


def test_detectors_are_plugged_in(model):
    def always(window):
        return [Finding("odd", stats.layer, None, "info", 1.0, 0.0, "odd", "none") for stats in window]

    with watch(model, every=1, rules=[always, CollapseDetector()]) as observer:
        for step in (1, 2):
            model(inputs())
            changed = observer.step(step)
    assert [alert.key for alert in changed] == ["first:odd", "second:odd"]


def test_alerts_go_on_in_another_watch(model):
    prefer(model.second, expert=5)
    first = Watch(model, every=1)
    for step in (1, 2):
        model(inputs())
        first.step(step)
    state = json.loads(json.dumps(first.state_dict()))
    first.detach()
    second = Watch(model, every=1)
    second.load_state_dict(state)
    assert second.alerts == first.alerts
    model(inputs())
    assert second.step(3) == []  # it is the same alert, not a new one
    second.detach()


def test_reduce_is_the_recorders(model):
    with Watch(model, every=1, reduce=lambda tensor: tensor.mul_(2)) as observer:
        model(inputs())
        observer.step(1)
    assert observer.stats()[0].num_tokens == 2 * T


def test_stats_are_a_copy_of_the_list(model):
    with watch(model, every=1) as observer:
        model(inputs())
        observer.step(1)
        observer.stats().clear()
        assert len(observer.stats()) == 2


def test_outputs_are_bit_identical_and_nothing_is_left(model):
    def hooks():
        return [(name, dict(module._forward_hooks), dict(module._forward_pre_hooks)) for name, module in named]

    named = list(model.named_modules())
    before, expected = hooks(), model(inputs())
    expected.sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    with watch(model, every=1) as observer:
        actual = model(inputs())
        actual.sum().backward()
        observer.step(1)
        assert hooks() != before
    assert torch.equal(actual, expected)
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))
    assert hooks() == before


def test_an_error_inside_detaches_too(model):
    with pytest.raises(RuntimeError, match="stop"), watch(model):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())


def test_every_must_be_positive(model):
    with pytest.raises(ValueError, match=r"every: expected at least 1 step per flush, got 0"):
        watch(model, every=0)
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_to_watch():
    with pytest.raises(ValueError, match=r"expected at least one layer with a routing tap.*build its experts with"):
        watch(nn.Linear(2, 2))


def test_little_traffic_is_judged_when_there_is_enough_of_it(model):
    """Single tokens: each flush says nothing by itself, together they show the collapse, however long they take."""
    prefer(model.second, 3)
    now = iter(range(0, 10**6, 3))
    observer = Watch(model, every=1, clock=lambda: float(next(now)))
    fired = []
    for step in range(1, 60):
        model(inputs(16))  # T K / E = 4 assignments per expert
        fired += [(step, alert.key) for alert in observer.step(step)]
    # 25 flushes bring 100 assignments per expert, the finding lasts in the 26th
    assert fired == [(26, "second:collapse")]


def test_traffic_older_than_the_window_does_not_count(model):
    prefer(model.second, 3)
    now = iter(range(0, 10**6, 3))
    observer = Watch(model, every=1, window_s=30.0, clock=lambda: float(next(now)))  # ten flushes: never enough
    assert not any(observer.step(step) for step in range(1, 60) if model(inputs(16)) is not None)


def test_a_burst_after_silence_is_judged_by_itself(model):
    observer = Watch(model, every=1)
    for step in (1, 2, 3):
        model(inputs())
        observer.step(step)
    prefer(model.second, 3)
    model(inputs())
    assert observer.step(4) == []
    model(inputs())
    assert [alert.key for alert in observer.step(5)] == ["second:collapse"]  # not diluted by the healthy past


def test_the_absolute_profile_alarms_on_a_healthy_model():
    torch.manual_seed(0)
    model = MoE(D, 8, 32, router=TopK(k=2))
    observer = Watch(model, every=1, profile="absolute")
    model(torch.randn(4096, D))
    observer.flush(1)
    model(torch.randn(4096, D))
    assert "utilisation_low" in {alert.finding.rule for alert in observer.flush(2)}
    with pytest.raises(ValueError, match="profile: expected relative or absolute"):
        Watch(model, profile="strict")


class Refusing(Notebook):
    """A sink that takes nothing."""

    def routing(self, window):
        raise OSError("no room left")

    alert = routing


def test_a_sink_that_raises_behind_a_queue_is_not_noticed_and_the_others_are_told(model):
    book, queue = Notebook(), Background(Refusing())
    prefer(model.second, expert=5)
    with Watch(model, every=1, sinks=[queue, book]) as observer:
        for step in (1, 2, 3):
            model(inputs())
            observer.step(step)
        assert [alert.key for alert in observer.alerts] == ["second:collapse"]
    assert queue.close(20)
    assert (queue.state.errors, queue.state.last_error) == (4, "OSError: no room left")
    assert ("alert", "second:collapse", "firing", 2) in book.pages


def test_the_error_of_a_bare_sink_is_raised_when_all_have_been_told(model):
    """It is the loop's own, a store that can't write for one; the watch is whole and goes on if the loop does."""
    book = Notebook()
    prefer(model.second, expert=5)
    with Watch(model, every=1, sinks=[Refusing(), book]) as observer:
        for step in (1, 2, 3):
            model(inputs())
            with pytest.raises(OSError, match="no room left"):
                observer.step(step)
        assert [alert.key for alert in observer.alerts] == ["second:collapse"]
    assert [page for page in book.pages if page[0] == "alert"] == [("alert", "second:collapse", "firing", 2)]
    assert [page[-1] for page in book.pages if page[0] == "routing"] == [1, 2, 3]


def test_a_sink_that_hangs_behind_a_queue_holds_up_no_step(model):
    """The sink has the first window and keeps it; all steps are done before it lets go."""

    class Hanging(Notebook):
        def __init__(self):
            super().__init__()
            self.there, self.gate = threading.Event(), threading.Event()

        def routing(self, window):
            self.there.set()
            assert self.gate.wait(20)
            super().routing(window)

    sink = Hanging()
    queue = Background(sink)
    with Watch(model, every=1, sinks=[queue]) as observer:
        for step in range(1, 6):
            model(inputs())
            observer.step(step)
            assert sink.there.wait(20)
        assert sink.pages == []
    sink.gate.set()
    assert queue.close(20)
    assert [page[-1] for page in sink.pages] == [1, 2, 3, 4, 5]


# ------------------------------------------------------------------------------------------------------ baselines


def healthy_baselines(model):
    with Watch(model, every=1) as observer:
        model(inputs())
        observer.flush(1)
        return baselines_of(observer.stats())


def fired(observer, model, flushes=2):
    """What fires in so many flushes of the same inputs."""
    keys = []
    for step in range(1, flushes + 1):
        model(inputs())
        keys += [alert.key for alert in observer.flush(step) if alert.state == "firing"]
    return keys


def move_load(layer):
    """Five experts of eight get more than they had, none of them all: no collapse, and nobody dies."""
    with torch.no_grad():
        layer.router.weight[:5, 0] += 0.1


def test_baselines_say_what_is_normal(model):
    baselines = healthy_baselines(model)
    with watch(model, every=1, baselines=baselines) as observer:
        assert fired(observer, model) == []
        move_load(model.second)
        assert fired(observer, model) == ["second:load_drift"]
    with watch(model, every=1) as observer:
        assert fired(observer, model) == []


def test_new_baselines_take_the_place_of_old_ones_and_alerts_go_on_until_they_resolve(model):
    observer = watch(model, every=1, baselines=healthy_baselines(model))
    move_load(model.second)
    assert fired(observer, model) == ["second:load_drift"]
    observer.use_baselines(healthy_baselines(model))
    assert [alert.key for alert in observer.alerts] == ["second:load_drift"]
    assert fired(observer, model) == []
    assert observer.alerts == []
    observer.use_baselines(None)
    with torch.no_grad():
        model.first.router.weight *= 8.0
    assert fired(observer, model) == []
    observer.detach()


def test_a_model_that_learns_is_not_compared_with_what_it_was(model):
    """Its loads and logits move; that its logits are numbers stays true."""
    baselines = healthy_baselines(model)
    with torch.no_grad():
        model.first.router.weight *= 8.0
    move_load(model.second)
    with Watch(model, every=1) as observer:
        observer.use_baselines(baselines)
        assert sorted(fired(observer, model)) == ["first:logits", "second:load_drift"]
    with Watch(model, every=1) as observer:
        observer.use_baselines(baselines, learning=True)
        assert fired(observer, model) == []
    [rule] = [rule for rule in rules_of("relative", baselines, learning=True) if isinstance(rule, LogitRule)]
    assert [each.rule for each in rule([replace(observer.stats()[0], logit_std=nan, logit_logsumexp=nan)])] == [
        "not_finite"
    ]


def test_rules_of_ones_own_stay_when_baselines_change(model):
    def always(window):
        return [Finding("odd", window[0].layer, None, "info", 1.0, 0.0, "odd", "none")]

    with Watch(model, every=1, rules=[always]) as observer:
        observer.use_baselines(healthy_baselines(model))
        assert fired(observer, model) == ["first:odd"]


def test_the_absolute_profile_compares_too(model):
    baselines = healthy_baselines(model)
    with torch.no_grad():
        model.first.router.weight *= 8.0
    with Watch(model, every=1, profile="absolute") as observer:
        assert "first:logit_std" not in fired(observer, model)
    for learning, compared in ((False, True), (True, False)):
        with Watch(model, every=1, profile="absolute") as observer:
            observer.use_baselines(baselines, learning=learning)
            assert ("first:logit_std" in fired(observer, model)) is compared


def test_baselines_of_another_model_are_refused_and_nothing_is_left(model):
    strange = {f"model.{name}": baseline for name, baseline in healthy_baselines(model).items()}
    with pytest.raises(
        ValueError, match=r"baselines: expected layers of this model, such as first, got model\.first, "
    ):
        watch(model, baselines=strange)
    assert not any(module._forward_hooks for module in model.modules())
    with (
        Watch(model, profile=None) as observer,
        pytest.raises(ValueError, match=r"baselines: expected a profile whose rules compare, got profile=None"),
    ):
        observer.use_baselines(strange)
