"""The decision tree on runs with a known cause; and the post-mortem that comes of it."""

import re
from dataclasses import replace

import numpy as np
import pytest

from equipoise.monitor.evidence import Evidence, evidence_of
from equipoise.monitor.postmortem import timeline, write_report
from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.monitor.store import RunStore
from equipoise.monitor.triage import onset, triage
from equipoise.types import Action, Alert, Finding

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
    assert (repaired.verdict, repaired.answer) == ("ok", "quantile_bias on b at step 80, applied.")


REPAIRED = "Has anything been done about it?"
BEFORE = {"loss_before": 2.3, "max_violation_before": 6.9}  # perplexity exp(2.3) = 9.974
APPLIED = Action("quantile_bias", "b", 70, "b:collapse", BEFORE | {"loss_after": 2.31})  # exp(2.31) = 10.07
UNDONE = replace(APPLIED, state="undone", note="held-out loss rose", detail={"steps": 0.0})
SPILL = Action("spill", "b", 70, "b:collapse", BEFORE)
KEPT = replace(SPILL, step=90, state="kept", note="over", detail={"max_violation_after": 0.2, "steps": 20.0})


def alert(rule="collapse", state="firing", layer="b", step=70, remedy="look at it"):
    finding = Finding(rule, layer, None, "critical", 1.0, 0.0, f"{layer} has {rule}", remedy)
    return Alert(f"{layer}:{rule}", state, 60, step, finding)


def repaired(*actions, alerts=(), broken=COLLAPSED, **kwargs):
    return asked(run_of(broken, logit_std=12.0, actions=actions, alerts=alerts, **kwargs)).get(REPAIRED)


class TestHasAnythingBeenDone:
    def test_each_repair_once_with_its_state_and_effect(self):
        check = repaired(APPLIED, UNDONE, SPILL, KEPT, healed=True)
        assert check.verdict == "ok"
        assert check.answer == (
            "quantile_bias on b at step 70, undone at once, perplexity 9.974 → 10.07, MaxVio 6.9 before "
            "(held-out loss rose); spill on b at step 70, kept after 20 steps, perplexity 9.974 before, "
            "MaxVio 6.9 → 0.2 (over)."
        )

    def test_nothing_says_what_is_possible(self):
        check = repaired()
        assert (check.verdict, check.answer, check.command) == ("unknown", "No repair is recorded.", "")
        assert "start the next one with --recover" in check.remedy
        assert "only proposes" in check.remedy

    def test_a_repair_on_trial(self):
        assert repaired(APPLIED).verdict == "ok"

    def test_one_that_was_undone_is_trouble(self):
        found = triage(run_of(COLLAPSED, logit_std=12.0, actions=(APPLIED, UNDONE)), "RUN")
        check = {check.question: check for check in found.checks}[REPAIRED]
        assert (check.verdict, check.since_step, check.layer, check.command) == (
            "trouble",
            70,
            "b",
            "equipoise watch RUN",
        )
        assert check.remedy.endswith("go back to a checkpoint from before step 60.")
        assert found.conclusion.endswith(check.remedy)  # and not the bias, which was tried in vain

    def test_one_that_failed_is_trouble(self):
        failed = replace(APPLIED, state="failed", note="needs dead experts, found none")
        check = repaired(APPLIED, UNDONE, failed)
        assert check.verdict == "trouble"
        assert "(needs dead experts, found none)." in check.answer

    def test_one_that_was_undone_is_no_trouble_once_the_layer_is_even(self):
        assert repaired(APPLIED, UNDONE, healed=True).verdict == "past"
        assert triage(run_of(COLLAPSED, logit_std=12.0, healed=True, actions=(APPLIED, UNDONE))).healthy

    def test_a_proposal_is_nothing_done(self):
        check = repaired(replace(APPLIED, state="proposed", detail={}, note="a bias"))
        assert check.verdict == "unknown"
        assert check.answer == "No, it was only proposed: quantile_bias on b at step 70, proposed (a bias)."
        assert "--recover" in check.remedy
        check = repaired(Action("look_at_input", "b", 70, "b:collapse", state="proposed"))
        assert "Compare what is sent" in check.remedy

    def test_no_repair_is_left(self):
        page = alert("recovery_exhausted", step=90, remedy="take it out of service")
        found = triage(run_of(COLLAPSED, logit_std=12.0, actions=(APPLIED, UNDONE), alerts=(alert(), page)))
        check = {check.question: check for check in found.checks}[REPAIRED]
        assert (check.verdict, check.since_step, check.remedy) == ("trouble", 90, "take it out of service")
        assert check.answer.startswith(
            "No repair is left, a human was called at step 90: b has recovery_exhausted. Done:"
        )
        assert found.conclusion.endswith("take it out of service")

    def test_a_page_that_is_over_is_none(self):
        page = [alert("recovery_exhausted", step=80), alert("recovery_exhausted", "resolved", step=90)]
        assert repaired(SPILL, KEPT, alerts=page, healed=True).verdict == "ok"

    def test_without_a_collapse_it_is_asked_about_the_alerts_that_fire(self):
        other = Action("temperature", "b", 80, "b:logits", state="undone")
        assert repaired(broken=FAIR) is None
        assert repaired(other, broken=FAIR) is None  # nothing fires
        assert repaired(alerts=[alert("logits")], broken=FAIR).verdict == "unknown"
        check = repaired(other, alerts=[alert("logits")], broken=FAIR)
        assert (check.verdict, check.answer) == ("trouble", "temperature on b at step 80, undone.")

    def test_repairs_of_other_layers_and_times_do_not_count_and_those_of_the_model_do(self):
        elsewhere, earlier = replace(APPLIED, layer="a"), replace(APPLIED, step=20)
        assert repaired(elsewhere, earlier).verdict == "unknown"
        assert "the whole model" in repaired(replace(APPLIED, layer="", kind="lr_cut")).answer

    def test_a_repair_before_the_latest_stretch_counts_while_its_alert_fires(self):
        """It made the layer even for a flush: the onset that is seen now is later than the repair."""
        broken_again = run_of(COLLAPSED, alerts=(alert(),), actions=(replace(APPLIED, step=70),))
        pause = [
            replace(s, counts_E=FAIR, max_token_share=0.25, effective_experts=8.0) for s in broken_again.routing["b"]
        ]
        history = tuple(pause[i] if stats.step == 80 else stats for i, stats in enumerate(broken_again.routing["b"]))
        checks = asked(replace(broken_again, routing={**broken_again.routing, "b": history}))
        assert checks["Does a layer send its tokens to few experts?"].since_step == 90
        assert "quantile_bias on b at step 70" in checks[REPAIRED].answer

    def test_of_many_the_newest_are_told(self):
        many = [replace(SPILL, step=60 + n, reason=f"b:{n}") for n in range(9)]
        answer = repaired(*many).answer
        assert answer.count("spill") == 6
        assert answer.endswith("; 3 earlier.")


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


EVIL = "<img src=x onerror=alert(1)> | `a` [b](javascript:c) *d* \\|\ne"
HOSTILE = Action(EVIL, "b", 95, "b:collapse", {EVIL: 1.0}, "failed", EVIL)


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
        for action in (APPLIED, UNDONE, SPILL, KEPT, HOSTILE):
            store.action(action)
        store.alert(Alert("b:collapse", "resolved", 60, 100, finding))
        yield store


def triage_finding(evidence):
    from equipoise.monitor.detectors import CollapseDetector

    return CollapseDetector()([evidence.routing["b"][6]])[0]


def report(store, path):
    evidence = evidence_of(store)
    return write_report(evidence, triage(evidence), path)


def test_the_timeline_has_every_change(store):
    events = timeline(evidence_of(store))
    assert [step for step, _, _ in events] == [60, 70, 70, 70, 70, 90, 90, 95, 100]
    assert all(when.endswith("UTC") for _, when, _ in events)
    what = [what for _, _, what in events if what.startswith("repair") and "onerror" not in what]
    assert what == [
        "repair applied: quantile_bias on b, for b:collapse (perplexity 9.974 → 10.07, MaxVio 6.9 before)",
        "repair undone: quantile_bias on b, for b:collapse: held-out loss rose",
        "repair applied: spill on b, for b:collapse (perplexity 9.974 before, MaxVio 6.9 before)",
        "repair kept: spill on b, for b:collapse (MaxVio 6.9 → 0.2): over",
    ]


def test_the_timeline_has_the_call_for_a_human(store):
    store.action(Action("page", "b", 99, "b:collapse", {}, "applied", "tried: spill undone"))
    events = {step: what for step, _, what in timeline(evidence_of(store))}
    assert events[99] == "a human is called for b:collapse: tried: spill undone"


def test_post_mortem(store, tmp_path):
    pytest.importorskip("matplotlib")
    markdown, page = report(store, tmp_path / "reports" / "night.md")
    assert (markdown.name, page.name) == ("night.md", "night.html")
    text = markdown.read_text()
    assert "repair applied: quantile_bias on b" in text
    assert (tmp_path / "reports" / "night-1.png").read_bytes().startswith(b"\x89PNG")
    shown = page.read_text()
    assert "<script>" not in shown + text
    assert "data:image/png;base64," in shown


def test_repairs_are_a_table_in_the_post_mortem(store, tmp_path):
    pytest.importorskip("matplotlib")
    markdown, page = report(store, tmp_path / "night")
    section = markdown.read_text().split("## Repairs\n\n")[1].split("\n\n")[0].splitlines()
    assert section[:4] == [
        "| step | what | why | state | perplexity | MaxVio | note |",
        "|---|---|---|---|---|---|---|",
        "| 70 | quantile_bias on b | b:collapse | undone at once | 9.974 → 10.07 | 6.9 before | held-out loss rose |",
        "| 70 | spill on b | b:collapse | kept after 20 steps | 9.974 before | 6.9 → 0.2 | over |",
    ]
    assert len(section) == 5
    shown = page.read_text()
    assert (
        "<td>70<td>spill on b<td>b:collapse<td>kept after 20 steps<td>9.974 before<td>6.9 → 0.2<td>over</tr>" in shown
    )
    assert "<th>perplexity<th>MaxVio" in shown


def test_hostile_names_stay_text_in_the_post_mortem(store, tmp_path):
    pytest.importorskip("matplotlib")
    markdown, page = report(store, tmp_path / "night")
    [row] = [line for line in markdown.read_text().splitlines() if line.startswith("| 95 |") and "failed |" in line]
    unescaped = re.sub(r"\\(.)", "", row)
    assert unescaped.count("|") == 8  # the seven cells' own
    assert not set("<`[]*") & set(unescaped)
    assert "<img" not in page.read_text().replace("<img alt=", "")


def test_a_run_without_repairs_says_so(tmp_path):
    pytest.importorskip("matplotlib")
    with RunStore(tmp_path / "run") as store:
        store.routing([flush("a", 10, FAIR)])
        markdown, page = report(store, tmp_path / "night")
    assert "## Repairs\n\nNo repair is recorded.\n" in markdown.read_text()
    assert "<h2>Repairs</h2><p>No repair is recorded.</p>" in page.read_text()
