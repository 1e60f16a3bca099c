"""The decision tree for a server: load, latency, weights, faults, and the commands that it advises."""

from dataclasses import replace

import pytest
from tests.monitor.test_triage import APPLIED, COLLAPSED, FAIR, UNDONE, alert, flush, run_of

from equipoise.monitor.check import Desk
from equipoise.monitor.evidence import Serving
from equipoise.monitor.triage import triage
from equipoise.types import Action, Alert, Finding

LIVE = Serving("/srv/run/serving", 8001, "step-000120", 1, False, "", (), (), 2, 256)
QUEUE = "Is there more to do than it can do?"
TAKES = "Does it take requests, and are its answers as good as usual?"
SLOW, FAULTS = "Is it slower than usual?", "Has someone put faults in on purpose?"
WEIGHTS, MIX = "Were other weights taken just before?", "Did the mix of prompts and answers change?"
REPAIRED = "Has anything been done about it?"


def server(broken=FAIR, live=LIVE, scalars=None, **kwargs):
    return run_of(broken, kind="server", serving=live, scalars=scalars or {}, **kwargs)


def asked(evidence):
    return {check.question: check for check in triage(evidence, "RUN").checks}


def level(*values, at_most=200):
    """Two hundred points: the first values, and the last one for the newest thirty."""
    return tuple((step, values[0] if step < at_most - 30 else values[-1]) for step in range(at_most))


def test_a_healthy_server():
    found = triage(server(scalars={"queue_depth": level(0.0), "inter_token_ms.p99": level(5.0)}))
    assert found.healthy
    questions = [check.question for check in found.checks]
    assert questions[0] == "Is the server alive, and are the numbers fresh?"
    assert {TAKES, QUEUE, SLOW, FAULTS} < set(questions)
    assert "Does the loss show anything?" not in questions


def test_one_that_has_served_nothing():
    checks = asked(server(routing={}))
    assert checks["Is the server alive, and are the numbers fresh?"].answer.startswith("No request has been served")
    assert (checks[QUEUE].verdict, checks[SLOW].verdict) == ("unknown", "unknown")
    assert checks["Are the router's logits sane?"].verdict == "unknown"


@pytest.mark.parametrize(
    ("live", "command"),
    [
        (replace(LIVE, down="the server is shutting down"), "/admin/resume"),
        (replace(LIVE, down="the engine's thread has ended"), "equipoise serve RUN"),
        (replace(LIVE, degraded=("b: a repair is in force",)), "/admin/state"),
    ],
)
def test_what_it_says_of_itself(live, command):
    check = asked(server(live=live))[TAKES]
    assert check.verdict == "trouble"
    assert (live.down or live.degraded[0]) in check.answer
    assert command in check.command


def test_its_folder_alone_does_not_say_whether_it_takes_requests():
    assert asked(server(live=None))[TAKES].verdict == "unknown"
    assert asked(server(live=None, status="finished"))[TAKES].verdict == "ok"


def test_a_full_queue():
    depth = {"queue_depth": level(0.0, 128.0)}  # half of 256
    check = asked(server(scalars=depth))[QUEUE]
    assert check.verdict == "trouble"
    assert "128 requests wait of at most 256" in check.answer
    assert asked(server(scalars={"queue_depth": level(0.0, 127.0)}))[QUEUE].verdict == "ok"
    assert asked(server(live=None, scalars=depth))[QUEUE].verdict == "ok"  # how long the queue may be is not known


def test_slower_than_usual_and_by_which_layer():
    times = {"inter_token_ms.p99": level(5.0, 16.0)}
    check = asked(server(scalars=times))[SLOW]
    assert (check.verdict, check.layer) == ("trouble", None)
    assert "next token 16 ms (p99), usual is 5" in check.answer
    check = asked(server(scalars=times | {"experts_ms.b.p99": level(1.0, 9.0), "experts_ms.a.p99": level(1.0)}))[SLOW]
    assert check.layer == "b"
    assert asked(server(scalars={"inter_token_ms.p99": level(5.0, 14.0)}))[SLOW].verdict == "ok"
    assert asked(server(scalars={"inter_token_ms.p99": level(5.0, 16.0)[-40:]}))[SLOW].verdict == "unknown"


def test_faults_that_someone_put_in_come_first():
    found = triage(server(COLLAPSED, replace(LIVE, faults=("collapse (layer 'b')",))))
    assert found.conclusion == "b has collapsed since step 60. A fault was put in on purpose. Take them out."
    assert "/admin/faults/remove" in {check.question: check for check in found.checks}[FAULTS].command


RELOAD = Action("reload", "", 55, "operator", {"version": 2.0}, "kept", "weights of step-000080")


def test_weights_that_came_just_before():
    found = triage(server(COLLAPSED, actions=(RELOAD,)))
    check = {check.question: check for check in found.checks}[WEIGHTS]
    assert (check.verdict, check.since_step) == ("trouble", 55)
    assert "weights of step-000080" in check.answer
    assert "/admin/reload/undo" in check.command
    assert "Other weights were taken just before." in found.conclusion
    for other in (replace(RELOAD, step=40), replace(RELOAD, step=70), replace(RELOAD, state="failed")):
        assert asked(server(COLLAPSED, actions=(other,)))[WEIGHTS].verdict == "ok"


def test_the_mix_of_the_batches():
    answers = {"tokens_per_s": tuple((step, 100.0) for step in range(0, 110, 10))}
    prompts = tuple((step, 25.0 if step < 60 else 900.0) for step in range(0, 110, 10))
    check = asked(server(COLLAPSED, scalars=answers | {"prompt_tokens_per_s": prompts}))[MIX]
    assert (check.verdict, check.since_step) == ("trouble", 60)
    assert "20% were prompts before and 90% after" in check.answer  # 25 / 125, 900 / 1000
    assert asked(server(COLLAPSED, scalars=answers))[MIX].verdict == "unknown"


def test_repairs_can_be_switched_on_and_routers_rolled_back():
    check = asked(server(COLLAPSED))[REPAIRED]
    assert "/admin/recovery" in check.command
    assert "'{\"act\":true}'" in check.command
    check = asked(server(COLLAPSED, actions=(APPLIED, UNDONE)))[REPAIRED]
    assert check.verdict == "trouble"
    assert "/admin/router/rollback" in check.command


def test_thin_flushes_say_nothing_and_the_monitors_alert_does():
    """Ten tokens per flush: only the monitor, which adds them up, can see that the layer has collapsed."""
    thin = {name: tuple(flush(name, step, COLLAPSED // 400, tokens=10) for step in (10, 20)) for name in "ab"}
    assert asked(server(routing=thin))["Does a layer send its tokens to few experts?"].verdict == "unknown"
    check = asked(server(routing=thin, alerts=(alert(),)))["Does a layer send its tokens to few experts?"]
    assert (check.verdict, check.layer, check.since_step) == ("trouble", "b", 60)
    assert check.answer == "b has collapse: an alert since step 70."


def test_commands_are_whole_and_quoted():
    command = Desk("/srv/it's; rm -rf ~/serving", server=True, admin_port=81).admin("drain")
    assert command == (
        "curl http://127.0.0.1:81/admin/drain -H \"authorization: Bearer $(cat '/srv/it'\"'\"'s; rm -rf "
        "~/serving/admin_token')\" -H 'content-type: application/json' -d '{}'"
    )
    assert "ADMIN_PORT" in Desk("RUN", server=True).admin("state")


def test_an_alert_names_the_slow_expert_whatever_the_times_say():
    finding = Finding("expert_p99", "b", 3, "warning", 80.0, 10.0, "b: expert 3 takes 80 ms (p99)", "look at it")
    opened = Action("breaker", "b", 90, "b:expert_p99", {}, "applied", "b/3: closed -> open")
    slow = Alert("b:expert_p99", "firing", 90, 95, finding)
    found = asked(server(alerts=[slow], actions=[opened], scalars={"inter_token_ms.p99": level(5.0)}))
    assert (found[SLOW].verdict, found[SLOW].layer, found[SLOW].since_step) == ("trouble", "b", 90)
    assert found[SLOW].answer == "Yes: b: expert 3 takes 80 ms (p99)."
    assert (found[REPAIRED].verdict, "b/3: closed -> open" in found[REPAIRED].answer) == ("ok", True)
    over = Alert("b:expert_p99", "resolved", 90, 98, finding)
    assert asked(server(alerts=[slow, over], scalars={"inter_token_ms.p99": level(5.0)}))[SLOW].verdict == "ok"
