"""The queue before a sink: order, overflow, errors, ends, forks; and a training step that does not wait for a pager."""

import json
import subprocess
import sys
import threading

import pytest
import torch
from tests.monitor.sinks.cases import PATIENCE_S, Answer, Clock, alert, deliver, quick, stats

from equipoise.layer import MoE
from equipoise.monitor.sinks.background import Background
from equipoise.monitor.sinks.delivery import Delivery, Redelivered
from equipoise.monitor.sinks.labels import Naming
from equipoise.monitor.sinks.webhook import Webhook, WebhookSink
from equipoise.monitor.watch import Watch
from equipoise.routing import TopK
from equipoise.types import Action


def action(step):
    return Action("quantile_bias", "blocks.3.moe", step, "blocks.3.moe:collapse")


class Notebook:
    """Writes down (kind, step) on the thread it is called on; can be held at a gate, and can fail."""

    def __init__(self):
        self.pages, self.threads = [], set()
        self.gate, self.at_gate = threading.Event(), threading.Event()
        self.gate.set()
        self.broken = False
        self.closed = 0

    def _write(self, kind, step):
        self.at_gate.set()
        assert self.gate.wait(PATIENCE_S)
        self.threads.add(threading.current_thread().name)
        if self.broken:
            raise OSError(f"no room for {kind} {step}")
        self.pages.append((kind, step))

    def routing(self, window):
        self._write("routing", window[0].step)

    def alert(self, alert):
        self._write("alert", alert.step)

    def action(self, action):
        self._write("action", action.step)

    def close(self):
        self.closed += 1


@pytest.fixture
def book():
    return Notebook()


def held(book, background):
    """Let the thread take one record and stop there, so that what follows is in the queue."""
    book.gate.clear()
    background.alert(alert(step=0))
    assert book.at_gate.wait(PATIENCE_S)


def test_everything_arrives_in_order_on_another_thread(book):
    with Background(book) as background:
        expected = []
        for step in range(1, 40, 3):
            background.routing([stats(step=step)])
            background.alert(alert(step=step + 1))
            background.action(action(step + 2))
            expected += [("routing", step), ("alert", step + 1), ("action", step + 2)]
        assert background.flush(PATIENCE_S)
        assert book.pages == expected
        assert background.state.handled == len(expected)
    assert book.threads == {"equipoise-sink"}
    assert book.closed == 1


def test_when_full_the_oldest_window_goes(book):
    background = Background(book, max_pending=4)
    held(book, background)
    for step in (1, 2):
        background.routing([stats(step=step)])
    background.alert(alert(step=3))
    background.action(action(4))  # full: windows 1 and 2, alert 3, action 4
    assert background.state.pending == 4
    background.alert(alert(step=5))  # window 1 goes
    background.routing([stats(step=6)])  # window 2 goes
    background.alert(alert(step=7))  # window 6 goes
    assert dict(background.state.dropped) == {"routing": 3, "alert": 0, "action": 0}
    background.routing([stats(step=8)])  # no window left to make room: it goes itself
    assert dict(background.state.dropped) == {"routing": 4, "alert": 0, "action": 0}
    background.alert(alert(step=9))  # only now an alert: the oldest of what is left
    background.action(action(10))  # and the action after it
    assert dict(background.state.dropped) == {"routing": 4, "alert": 1, "action": 1}
    book.gate.set()
    assert background.close(PATIENCE_S)
    assert book.pages == [("alert", 0), ("alert", 5), ("alert", 7), ("alert", 9), ("action", 10)]


def test_errors_are_counted_and_stay_inside(book):
    background = Background(book)
    book.broken = True
    for step in (1, 2):
        background.alert(alert(step=step))
    assert background.flush(PATIENCE_S)
    state = background.state
    assert (state.errors, state.handled, state.last_error) == (2, 0, "OSError: no room for alert 2")
    book.broken = False
    background.alert(alert(step=3))
    assert background.close(PATIENCE_S)
    assert book.pages == [("alert", 3)]


def test_close_gives_up_on_a_sink_that_hangs(book):
    background = Background(book)
    held(book, background)
    background.alert(alert(step=1))
    background.routing([stats(step=2)])
    assert not background.close(timeout=0.01)
    assert dict(background.state.dropped) == {"routing": 1, "alert": 1, "action": 0}
    background.alert(alert(step=3))  # nothing is taken any more, nothing is raised
    assert background.state.dropped["alert"] == 2
    assert not background.close(timeout=0.01)
    book.gate.set()


def test_close_twice_and_never_used(book):
    background = Background(book)
    assert background.close()
    assert background.close()
    assert book.threads == set()
    assert book.closed >= 1


def test_an_idle_sink_is_ticked():
    class Clockwork(Notebook):
        def __init__(self):
            super().__init__()
            self.ticked = threading.Semaphore(0)

        def tick(self):
            self.threads.add(threading.current_thread().name)
            self.ticked.release()

    book = Clockwork()
    with Background(book, tick_s=0.01) as background:
        background.alert(alert())
        for _ in range(3):
            assert book.ticked.acquire(timeout=PATIENCE_S)
        assert background.state.handled == 1  # ticks are not counted
    assert book.threads == {"equipoise-sink"}


def test_close_puts_what_is_left_into_the_dead_letters(server, tmp_path):
    """In hand with a server that hangs, or still in the queue: on disk, in order, without waiting for the server."""
    path = tmp_path / "dead.jsonl"
    config = Webhook(Naming("run"), url=server.url, effort=quick(timeout_s=PATIENCE_S, dead_letters=path))
    background = Background(config.build())
    server.hold.set()
    background.alert(alert(step=1))
    server.next()  # it is in hand
    background.alert(alert("resolved", step=2))
    background.routing([stats()])
    assert not background.close(timeout=0.01)
    letters = [json.loads(line) for line in path.read_text().splitlines()]
    assert [letter["body"]["alerts"][0]["annotations"]["step"] for letter in letters] == ["1", "2"]
    assert letters[0]["reason"] == "the process is ending"
    assert background.state.dropped["routing"] == 0
    # The one in hand gets through after all: its letter is out of date, the one that came later is not.
    server.hold.clear()
    server.release.set()
    assert background.flush(PATIENCE_S)
    config = Webhook(Naming("run"), url=server.url, effort=quick(dead_letters=path))
    assert config.build().delivery.redeliver() == Redelivered(sent=1, kept=0, outdated=1)
    assert server.next().body["status"] == "resolved"


def test_close_cuts_the_pause_between_tries_short(server, tmp_path):
    path = tmp_path / "dead.jsonl"
    server.answers.append(Answer(503, {"retry-after": "3600"}))
    effort = quick(longest_wait_s=7200.0, dead_letters=path)
    config = Webhook(Naming("run"), url=server.url, effort=effort)
    background = Background(WebhookSink(config, Delivery(config.destination, effort)))
    background.alert(alert())
    server.next()
    assert not background.close(timeout=0.01)
    background.flush(PATIENCE_S)
    assert len(path.read_text().splitlines()) == 1  # once, though two threads had it in hand


def test_a_hanging_pager_does_not_hold_up_a_step(server):
    """The server has the request and does not answer; steps go on, and the alert is delivered once it does."""
    torch.manual_seed(0)
    model = MoE(16, 8, 8, router=TopK(k=2))
    x = torch.randn(512, 16)
    x[:, 0] = 1.0
    with torch.no_grad():
        model.router.weight[5, 0] += 20.0
    config = Webhook(Naming("run"), url=server.url, effort=quick(timeout_s=PATIENCE_S))
    background = Background(WebhookSink(config, deliver(config, Clock())))
    server.hold.set()
    with Watch(model, every=1, sinks=[background]) as watch:
        fired = []
        for step in (1, 2):
            model(x)
            fired += watch.step(step)
        assert [alert.state for alert in fired] == ["firing"]
        assert server.next().body["status"] == "firing"  # the server has it, and holds it
        for step in range(3, 9):
            model(x)
            watch.step(step)
        assert not server.release.is_set()
        assert background.state.handled == 2  # the windows before the alert; the rest waits in the queue
        assert background.state.pending == 6
    server.release.set()
    assert background.close(PATIENCE_S)
    assert (background.state.handled, background.state.errors) == (9, 0)


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


PRELUDE = """
import os, sys, threading
from equipoise.monitor.sinks.background import Background
from equipoise.monitor.sinks.jsonl import JsonLines
from equipoise.types import Action
def action(step): return Action("repair", "layer", step, "why")
"""


def test_what_waits_when_the_program_ends_is_written(tmp_path):
    code = (
        PRELUDE + "background = Background(JsonLines(sys.argv[1]))\nfor n in range(300): background.action(action(n))"
    )
    run(code, tmp_path / "log.jsonl")
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == list(range(300))


def test_a_forked_child_has_its_own_queue(tmp_path):
    """A data loader's worker, say: the parent's thread is not there, and what waits is the parent's to deliver."""
    code = (
        PRELUDE
        + """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # that of Python 3.12, of forks beside threads
class Gated:
    def __init__(self):
        self.gate, self.there = threading.Event(), threading.Event()
        self.log = JsonLines(sys.argv[1])
    def action(self, action):
        self.there.set()
        self.gate.wait(20)
        self.log.action(action)
sink = Gated()
background = Background(sink)
background.action(action(1))
background.action(action(2))
sink.there.wait(20)
with background._changed:  # as if another thread had the lock at this moment
    child = os.fork()
if child == 0:
    sink.gate.set()
    assert background.state.pending == 0
    background.action(action(3))
    assert background.close(20)
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
sink.gate.set()
assert background.close(20)
"""
    )
    run(code, tmp_path / "log.jsonl")
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [3, 1, 2]


@pytest.mark.parametrize(
    ("values", "message"), [({"max_pending": 0}, "room for at least 1"), ({"tick_s": 0}, "above 0")]
)
def test_numbers_that_make_no_sense(book, values, message):
    with pytest.raises(ValueError, match=message):
        Background(book, **values)
