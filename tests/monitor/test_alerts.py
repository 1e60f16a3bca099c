"""The alert book: fires once, resolves once, inhibits symptoms, survives a restart."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.monitor.alerts import AlertBook, alert_key, still_firing
from equipoise.types import Alert, Finding


def finding(rule="collapse", layer="a", expert=None, value=0.9):
    return Finding(rule, layer, expert, "critical", value, 0.5, f"{layer} {rule}", "do something")


def transitions(book, flushes):
    """(step, key, state) of everything that `observe` returned over the flushes."""
    return [
        (step, alert.key, alert.state)
        for step, findings in enumerate(flushes)
        for alert in book.observe(step, findings)
    ]


def test_fires_after_two_in_a_row_and_resolves_after_two_clean():
    flushes = [[finding()], [finding()], [finding()], [], [], []]
    assert transitions(AlertBook(), flushes) == [(1, "a:collapse", "firing"), (4, "a:collapse", "resolved")]


def test_an_alert_tells_when_it_began_and_its_latest_finding():
    book = AlertBook()
    book.observe(50, [finding(value=0.6)])
    (fired,) = book.observe(100, [finding(value=0.7)])
    assert (fired.since_step, fired.step, fired.finding.value) == (50, 100, 0.7)
    book.observe(150, [finding(value=0.8)])
    (now,) = book.firing
    assert (now.since_step, now.step, now.finding.value) == (50, 150, 0.8)
    book.observe(200, [])
    (resolved,) = book.observe(250, [])
    assert (resolved.state, resolved.since_step, resolved.step) == ("resolved", 50, 250)
    assert book.firing == []


def test_one_flush_is_not_an_alert():
    assert transitions(AlertBook(), [[finding()], [], [finding()], [], [finding()]]) == []


def test_one_clean_flush_does_not_resolve():
    flushes = [[finding()], [finding()], [], [finding()], [], [finding()]]
    assert transitions(AlertBook(), flushes) == [(1, "a:collapse", "firing")]


def test_the_expert_may_move_within_one_alert():
    flushes = [[finding(expert=1)], [finding(expert=2)], [finding(expert=3), finding(expert=4)]]
    book = AlertBook()
    assert transitions(book, flushes) == [(1, "a:collapse", "firing")]
    assert book.firing[0].finding.expert == 3  # of two with the same key the first counts


def test_collapse_inhibits_the_other_findings_of_its_layer():
    both = [finding(), finding("dead_experts"), finding("dead_experts", layer="b")]
    assert transitions(AlertBook(), [both, both, both]) == [
        (1, "a:collapse", "firing"),
        (1, "b:dead_experts", "firing"),
    ]


def test_inhibited_alerts_stand_still_until_the_collapse_is_over():
    book, dead, both = AlertBook(), [finding("dead_experts")], [finding(), finding("dead_experts")]
    flushes = [dead, dead, both, both, [], [], [], []]
    assert transitions(book, flushes) == [
        (1, "a:dead_experts", "firing"),
        (3, "a:collapse", "firing"),
        (5, "a:collapse", "resolved"),  # the clean flushes 4 and 5 count for the collapse only
        (7, "a:dead_experts", "resolved"),
    ]


def test_a_layer_without_opinion_keeps_its_alerts():
    book = AlertBook()
    transitions(book, [[finding()], [finding()]])
    for step in range(2, 6):
        assert book.observe(step, [], unjudged={"a"}) == []
    assert [alert.key for alert in book.firing] == ["a:collapse"]


def test_fire_and_resolve_at_once_if_asked():
    book = AlertBook(fire_after=1, resolve_after=1)
    assert transitions(book, [[finding()], []]) == [(0, "a:collapse", "firing"), (1, "a:collapse", "resolved")]


rules = st.sampled_from([("collapse", "a"), ("dead_experts", "a"), ("dead_experts", "b"), ("drift", "b")])
histories = st.lists(st.lists(rules, unique=True).map(lambda found: [finding(r, la) for r, la in found]), max_size=30)


@settings(deadline=None)
@given(histories, st.integers(1, 3), st.integers(1, 3))
def test_every_key_alternates_between_firing_and_resolved(flushes, fire_after, resolve_after):
    book = AlertBook(fire_after=fire_after, resolve_after=resolve_after)
    states = {}
    for _, key, state in transitions(book, flushes):
        assert state == ("firing" if states.get(key, "resolved") == "resolved" else "resolved")
        states[key] = state
    assert {alert.key for alert in book.firing} == {key for key, state in states.items() if state == "firing"}


@settings(deadline=None)
@given(histories, histories)
def test_a_resumed_book_goes_on_as_if_nothing_had_happened(before, after):
    book = AlertBook()
    transitions(book, before)
    resumed = AlertBook()
    resumed.load_state_dict(json.loads(json.dumps(book.state_dict())))
    assert resumed.firing == book.firing
    assert transitions(resumed, after) == transitions(book, after)


@pytest.mark.parametrize("name", ["fire_after", "resolve_after"])
def test_zero_flushes_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1 flush, got 0"):
        AlertBook(**{name: 0})


def test_a_state_of_another_version_is_refused():
    with pytest.raises(ValueError, match=r"alert state: expected version 1, got 99; start with a new AlertBook"):
        AlertBook().load_state_dict({"version": 99})


def test_a_damaged_state_is_refused_and_changes_nothing():
    book = AlertBook(fire_after=1)
    book.observe(1, [finding()])
    with pytest.raises(ValueError, match=r"alert state: expected what state_dict\(\) returned, got damaged entries"):
        book.load_state_dict({"version": 1, "entries": {"a:collapse": {"finding": {}}}})
    assert [alert.key for alert in book.firing] == ["a:collapse"]


def test_the_key_names_layer_and_rule():
    assert alert_key(finding("collapse", "blocks.3.moe", expert=7)) == "blocks.3.moe:collapse"


def test_what_still_fires_at_the_end_of_a_history_is_as_it_was_when_it_fired():
    def alert(layer, state, step, expert=None):
        return Alert(f"{layer}:collapse", state, 1, step, finding(layer=layer, expert=expert))

    history = [
        alert("a", "firing", 2, expert=3),
        alert("b", "firing", 2),
        alert("b", "resolved", 4),
        alert("a", "firing", 6, expert=5),  # said again while it fires, as pages may be
        alert("c", "firing", 6, expert=1),
        alert("c", "resolved", 8),
        alert("c", "firing", 9, expert=2),
    ]
    assert [(each.key, each.step, each.finding.expert) for each in still_firing(history)] == [
        ("a:collapse", 2, 3),
        ("c:collapse", 9, 2),
    ]
    assert still_firing([]) == []
