"""The decision tree on runs with a known cause; and the post-mortem that comes of it."""

from dataclasses import replace

import numpy as np
import pytest

from equipoise.monitor.evidence import Evidence, evidence_of
from equipoise.monitor.postmortem import timeline, write_report
from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.monitor.store import RunStore
from equipoise.monitor.triage import onset, triage
from equipoise.types import Action, Alert

E, TOKENS = 8, 4000
FAIR = np.full(E, 1000)
COLLAPSED = np.array([4000, 4000, 0, 0, 0, 0, 0, 0])
SHIFTED = np.array([2000, 1800, 1600, 1000, 800, 400, 200, 200])


def flush(layer, step, counts_E, logit_std=1.0, tokens=TOKENS, dropped=0):
    moments = (0.0, 0.0, tokens * E * logit_std**2, 2.0 * tokens)
    sums = RoutingSums(tokens, counts_E, counts_E * tokens / counts_E.sum(), *moments, {"capacity": dropped}, {})
    return routing_stats(layer, step, sums)


def run_of(broken, others=FAIR, *, logit_std=1.0, tokens=TOKENS, dropped=0, healed=False, **kwargs) -> Evidence:
    """Ten flushes of 10 steps; from step 60 on "b" has the counts `broken`, "a" and "c" have `others`."""
    routing = {name: [] for name in "abc"}
    for step in range(10, 110, 10):
        late = step >= 60 and not (healed and step >= 90)
        factor = tokens / TOKENS if late else 1
        for name in "abc":
            counts = (broken if name == "b" else others) if late else FAIR
            std = logit_std if late and name == "b" else 1.0
            scaled = (counts * factor).astype(np.int64)
            routing[name].append(flush(name, step, scaled, std, int(TOKENS * factor), dropped if late else 0))
    losses = tuple((step, 3.0 - step / 1000) for step in range(1, 101))
    fields = {
        "name": "run",
        "status": "running",
        "age_s": 2.0,
        "routing": {name: tuple(history) for name, history in routing.items()},
        "scalars": {"loss": losses, "grad_norm": tuple((step, 1.0) for step in range(1, 101))},
        "alerts": (),
        "actions": (),
        "times": {step: 1e9 + step for step in range(1, 101)},
    }
    return Evidence(**fields | kwargs)


def asked(evidence):
    return {check.question: check for check in triage(evidence, "RUN").checks}


def test_a_healthy_run():
    found = triage(run_of(FAIR))
    assert found.healthy
    assert found.conclusion == "Nothing is wrong that routing could show."
    assert "the least even layer now is" in found.checks[1].answer


def test_damage_to_one_router():
    found = triage(run_of(COLLAPSED, logit_std=12.0))
    assert not found.healthy
    assert found.conclusion.startswith("b has collapsed since step 60. Its own logits jumped")
    checks = {check.question: check for check in found.checks}
    assert checks["Did the other layers' loads move at the same time?"].verdict == "ok"
    assert "from 1 to 12" in checks["Did this router's logits change?"].answer
    assert checks["Has anything been done about it?"].verdict == "unknown"


def test_another_mix_of_input():
    found = triage(run_of(COLLAPSED, SHIFTED, logit_std=1.1))
    assert "Other layers moved with it: look at the input first." in found.conclusion


def test_a_drift():
    found = triage(run_of(COLLAPSED))
    assert "it drifted there" in found.conclusion


def test_an_incident_that_is_over():
    action = Action("quantile_bias", "b", 80, "b:collapse")
    found = triage(run_of(COLLAPSED, logit_std=12.0, healed=True, actions=(action,)))
    assert found.healthy
    assert found.conclusion.startswith("Nothing is wrong now. b had collapsed at step 60: Its own logits jumped")
    repaired = {check.question: check for check in found.checks}["Has anything been done about it?"]
    assert repaired.answer == "quantile_bias on b at step 80, for b:collapse."


def test_traffic_optimizer_drops_dead_and_loss():
    assert "20,000 in the first" in asked(run_of(COLLAPSED, tokens=20_000))["Did the amount of traffic change?"].answer
    norms = tuple((step, 9.0 if step == 58 else 1.0) for step in range(1, 101))
    spiked = run_of(COLLAPSED, scalars={"loss": ((1, 3.0),), "grad_norm": norms})
    assert (
        asked(spiked)["Did the optimizer do something unusual just before?"].verdict == "unknown"
    )  # too little before
    assert asked(run_of(FAIR, dropped=800))["Are assignments dropped?"].verdict == "trouble"
    assert "0 0" not in asked(run_of(COLLAPSED))["Are experts dead?"].answer
    assert asked(run_of(COLLAPSED))["Are experts dead?"].answer == "In 1 layers: b: 2, 3, 4, 5, 6, 7."
    rising = tuple((step, 3.0 + (step > 80)) for step in range(1, 101))
    assert asked(run_of(FAIR, scalars={"loss": rising}))["Does the loss show anything?"].verdict == "trouble"
    blown = run_of(FAIR)
    wild = tuple(replace(stats, logit_logsumexp=float("inf")) for stats in blown.routing["a"])
    assert asked(replace(blown, routing={"a": wild}))["Are the router's logits sane?"].verdict == "trouble"


def test_a_silent_run_and_an_empty_one():
    assert asked(run_of(FAIR, age_s=4000.0))["Is the run alive, and are the numbers fresh?"].verdict == "trouble"
    empty = triage(run_of(FAIR, routing={}))
    assert empty.conclusion == "Nothing can be said yet."


def test_onset_is_the_latest_stretch():
    history = [flush("a", step, COLLAPSED if step in (10, 30, 40) else FAIR) for step in (10, 20, 30, 40, 50)]
    assert onset(history) == (30, 40)
    assert onset(history[1:2]) is None


@pytest.fixture
def store(tmp_path):
    evidence = run_of(COLLAPSED, logit_std=12.0, healed=True)
    with RunStore(tmp_path / "run") as store:
        store.set_meta(name="<script>alert(1)</script>", status="finished")
        for flushes in zip(*evidence.routing.values(), strict=True):
            store.routing(flushes)
            store.scalars(flushes[0].step, {"loss": 3.0})
        finding = triage_finding(evidence)
        store.alert(Alert("b:collapse", "firing", 60, 70, finding))
        store.action(Action("quantile_bias", "b", 70, "b:collapse"))
        store.alert(Alert("b:collapse", "resolved", 60, 100, finding))
        yield store


def triage_finding(evidence):
    from equipoise.monitor.detectors import CollapseDetector

    return CollapseDetector()([evidence.routing["b"][6]])[0]


def test_post_mortem(store, tmp_path):
    pytest.importorskip("matplotlib")
    events = timeline(evidence_of(store))
    assert [step for step, _, _ in events] == [60, 70, 70, 90, 100]
    assert all(when.endswith("UTC") for _, when, _ in events)
    markdown, page = write_report(store, tmp_path / "reports" / "night.md")
    assert (markdown.name, page.name) == ("night.md", "night.html")
    text = markdown.read_text()
    assert "repair quantile_bias on b" in text
    assert (tmp_path / "reports" / "night-1.png").read_bytes().startswith(b"\x89PNG")
    shown = page.read_text()
    assert "<script>" not in shown + text
    assert "data:image/png;base64," in shown
