"""A run that was really trained, and everything that looks after it while it is served; no sockets."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from equipoise.models.device import pick_device
from equipoise.models.run_files import Loaded, load
from equipoise.recovery.gate import Gate
from equipoise.serve.care import Care, CareConfig, Shared
from equipoise.serve.engine import Engine
from equipoise.serve.equipment import Equipment, equip
from equipoise.serve.operator import Operator
from equipoise.serve.request import Output, Request
from equipoise.train.recipes import recipe
from equipoise.train.report import Silent
from equipoise.train.run import train

PROMPTS = ("In the beginning", "def read(self):", "It is a truth", "And the king said", "import os", "The house")


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A run folder: two checkpoints, a tokenizer, held-out text, a known-good record."""
    folder = tmp_path_factory.mktemp("served") / "run"
    config = recipe("tiny")
    train(replace(config, steps=80, eval_every=0, checkpoint_every=40), folder, Silent())
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(trained, tmp_path / "run")


class Heard:
    """A sink that remembers."""

    def __init__(self):
        self.flushes, self.alerts, self.actions = [], [], []

    def routing(self, window):
        self.flushes.append(list(window))

    def alert(self, alert):
        self.alerts.append(alert)

    def action(self, action):
        self.actions.append(action)


@dataclass
class Served:
    """An engine under care, in one thread: `traffic` and then `care.look()`."""

    loaded: Loaded
    equipment: Equipment
    engine: Engine
    care: Care
    operator: Operator
    heard: Heard
    gate: Gate
    forgotten: list[int]
    num_steps: int = 0
    num_requests: int = 0

    def traffic(self, num_requests: int = 12, max_tokens: int = 24) -> list[Output]:
        """Requests of several domains, each with another continuation, to their end."""
        tokenizer = self.loaded.tokenizer
        for _ in range(num_requests):
            self.num_requests += 1
            text = f"{PROMPTS[self.num_requests % len(PROMPTS)]} {self.num_requests}"
            self.engine.add(Request(f"r{self.num_requests}", tuple(tokenizer.encode(text).tolist()), max_tokens))
        outputs = []
        while self.engine.has_work:
            with self.gate.running():
                outputs += self.engine.step()
            self.num_steps += 1
        return outputs


@pytest.fixture
def serve(run, tmp_path):
    """Makes a `Served`; everything is detached at the end."""
    made = []

    def make(config: CareConfig = CareConfig(), path: Path = run) -> Served:  # noqa: B008 - frozen
        loaded, gate, heard, forgotten = load(path, device=pick_device("auto")), Gate(), Heard(), []
        equipment = equip(loaded, tmp_path / "serving")
        engine = Engine(loaded.model, loaded.tokenizer, num_blocks=256)

        def forget() -> None:
            forgotten.append(served.num_steps)
            engine.forget_cache()

        shared = Shared(gate, lambda: served.num_steps, forget)
        care = Care(loaded, equipment, shared, config, (heard,))
        operator = Operator(loaded, care, equipment.canary)
        served = Served(loaded, equipment, engine, care, operator, heard, gate, forgotten)
        made.append(served)
        return served

    yield make
    for served in made:
        served.care.stop()
        served.engine.close()
