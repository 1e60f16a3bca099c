"""Which findings are left over from a repaired collapse, flush by flush; the whole story is in live/test_care.py."""

import pytest

from equipoise.serve.aftermath import Aftermath
from equipoise.types import Action, Alert, Finding

LAYER, KEY = "a", "a:collapse"


def finding(rule, severity="warning", layer=LAYER):
    return Finding(rule, layer, None, severity, 4.0, 3.0, f"{layer}: {rule}", "mend it")


COLLAPSE, WIDE = finding("collapse", "critical"), finding("logits")
FIRING = Alert(KEY, "firing", 1, 2, COLLAPSE)


@pytest.fixture
def after():
    """After a collapse in which the logits were wide, and its repair."""
    aftermath = Aftermath()
    assert aftermath.sift([COLLAPSE, WIDE], [], ()) == [COLLAPSE, WIDE]
    aftermath.alert(FIRING)
    assert aftermath.sift([WIDE], [FIRING], ()) == [WIDE]
    assert aftermath.proposals(3) == []
    aftermath.alert(Alert(KEY, "resolved", 1, 3, COLLAPSE))
    aftermath.action(Action("quantile_bias", LAYER, 3, KEY, {}, "kept"))
    return aftermath


def test_they_are_held_back_and_proposed_once(after):
    [proposed] = after.proposals(3)
    assert (proposed.kind, proposed.step, proposed.reason, proposed.state) == ("router_rollback", 3, KEY, "proposed")
    other = finding("logits", layer="b")
    assert after.sift([WIDE, other, finding("drops")], [], ()) == [other, finding("drops")]
    assert after.findings == (WIDE,)
    assert after.proposals(4) == []


def test_what_becomes_critical_is_an_alert(after):
    worse = finding("logits", "critical")
    assert after.sift([worse], [], ()) == [worse]
    assert after.sift([WIDE], [], ()) == [WIDE]


def test_what_goes_away_and_comes_back_is_an_alert(after):
    assert after.sift([], [], ()) == []
    assert after.sift([WIDE], [], ()) == [WIDE]


def test_silence_is_not_an_end(after):
    assert after.sift([], [], {LAYER}) == []
    assert after.sift([WIDE], [], ()) == []


@pytest.mark.parametrize(
    "action",
    [Action("router_rollback", LAYER, 5, "operator", {}, "kept"), Action("reload", "", 5, "operator", {}, "kept")],
)
def test_another_router_has_no_aftermath(after, action):
    after.action(action)
    assert after.findings == ()
    assert after.sift([WIDE], [], ()) == [WIDE]


def test_a_collapse_that_nobody_repaired_leaves_nothing(after):
    untouched = Aftermath()
    untouched.sift([COLLAPSE, WIDE], [], ())
    untouched.alert(Alert(KEY, "resolved", 1, 3, COLLAPSE))
    assert untouched.sift([WIDE], [], ()) == [WIDE]
    after.alert(FIRING)  # and it comes back: what was kept did not hold
    assert after.sift([COLLAPSE, WIDE], [FIRING], ()) == [COLLAPSE, WIDE]
    assert after.findings == ()


def test_an_alert_that_fired_before_the_collapse_stays_one():
    aftermath, alert = Aftermath(), Alert("a:logits", "firing", 1, 1, WIDE)
    aftermath.sift([COLLAPSE, WIDE], [alert], ())
    aftermath.alert(FIRING)
    aftermath.action(Action("quantile_bias", LAYER, 3, KEY, {}, "kept"))
    assert aftermath.sift([WIDE], [alert], ()) == [WIDE]
