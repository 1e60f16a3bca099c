"""What the tests of the sinks share: an HTTP server of their own, a clock that only moves when told, and records."""

import json
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue

import numpy as np

from equipoise.monitor.sinks.delivery import Delivery, Effort
from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.types import Action, Alert, Finding

PATIENCE_S = 20  # how long a test waits for what must come; no test waits for nothing to happen


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict
    body: object


@dataclass(frozen=True)
class Answer:
    status: int = 200
    headers: dict = field(default_factory=dict)
    body: bytes = b"ok"
    echo: bool = False  # say back all that was sent, as a careless server would


class Server:
    """Answers POSTs with `answers`, in turn, and then 200. While `hold` is set, it takes requests and says nothing."""

    def __init__(self, port=0):
        self.answers = deque()
        self.received = Queue()
        self.hold = threading.Event()
        self.release = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._server.handle_error = lambda request, address: None  # a client that gave up is part of the test
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def _handler(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                raw = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                answer = server.answers.popleft() if server.answers else Answer()
                server.received.put(Received(self.path, headers, json.loads(raw)))
                if server.hold.is_set():
                    server.release.wait(PATIENCE_S)
                body = answer.body
                if answer.echo:
                    body = f"bad request {self.path} {headers} ".encode() + raw + b" end"
                self.send_response(answer.status)
                for name, value in {**answer.headers, "content-length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        return Handler

    def next(self):
        return self.received.get(timeout=PATIENCE_S)

    def all(self):
        """What has come so far."""
        return [self.received.get_nowait() for _ in range(self.received.qsize())]

    def close(self):
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(PATIENCE_S)


class Clock:
    """Seconds that pass only in `sleep`, which is written down."""

    def __init__(self, now=0.0):
        self.now = now
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def quick(**changes):
    """An effort that a test can wait for: many tries, no rate limit to speak of."""
    return Effort(**{"timeout_s": 5.0, "attempts": 4, "per_minute": 6e6, "burst": 1000, **changes})


def deliver(config, clock=None):
    """The delivery of a sink's configuration, with the time of the clock."""
    clock = clock or Clock()
    return Delivery(config.destination, config.effort, clock=clock, sleep=clock.sleep)


def finding(**changes):
    values = {
        "rule": "collapse",
        "layer": "blocks.3.moe",
        "expert": 5,
        "severity": "critical",
        "value": 0.97,
        "threshold": 0.5,
        "message": "blocks.3.moe has collapsed: expert 5 takes 97.0% of the tokens, fair is 25.0%",
        "remedy": "rebalance the layer's bias, or go back to the last known-good router",
    }
    return Finding(**{**values, **changes})


def alert(state="firing", step=100, since_step=50, **changes):
    about = finding(**changes)
    return Alert(f"{about.layer}:{about.rule}", state, since_step, step, about)


BEFORE = {"loss_before": 2.3, "max_violation_before": 2.98765}  # perplexity exp(2.3) = 9.974


def repair(state="applied", step=120, detail=None, note="", kind="quantile_bias", reason="blocks.3.moe:collapse"):
    """One change of a repair. Without a detail, what is known in that state; exp(2.31) = 10.07, exp(2.29) = 9.875."""
    known = {
        "applied": BEFORE | {"loss_after": 2.31},
        "kept": {"loss_after": 2.29, "max_violation_after": 0.25, "steps": 20.0},
        "undone": {"steps": 0.0},
    }
    return Action(kind, "blocks.3.moe", step, reason, known.get(state, {}) if detail is None else detail, state, note)


def stats(layer="blocks.3.moe", step=50, counts_E=(40, 0, 60, 28)):
    counts_E = np.asarray(counts_E, dtype=np.int64)
    sums = RoutingSums(
        64, counts_E, counts_E / 2.0, 30.0, 3.0, 80.0, 9.0, {"capacity": 3, "tokens": 1}, {"switch": 65.0}
    )
    return routing_stats(layer, step, sums)
