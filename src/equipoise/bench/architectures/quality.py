"""Training each architecture on the same batches: loss, balance, speed. What is done is kept, and not done again."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from equipoise.disk.atomic import atomic_write
from equipoise.train.config import TrainConfig
from equipoise.train.data import TokenData
from equipoise.train.loop import Trainer
from equipoise.train.report import Silent

_LAST_WINDOWS = 5  # of the monitor, over which balance is averaged


@dataclass(frozen=True)
class Outcome:
    """loss: nats per token of validation text. max_violation: mean over what is routed, None where nothing is."""

    loss: float
    max_violation: float | None
    seconds: float


def outcome(config: TrainConfig, text: Callable[[int], TokenData], folder: Path) -> Outcome:
    """Train and evaluate, or what a run of this very configuration has come to before.

    text: the data of a seed. folder: where outcomes are kept, a file each, named by the configuration's hash.
    """
    told = config.to_json()
    path = folder / f"{hashlib.sha256(told.encode()).hexdigest()[:20]}.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.pop("config") == json.loads(told):
            return Outcome(**kept)
    data = text(config.seed)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(config.with_vocab(data.tokenizer.vocab_size), data, Path(scratch) / "run", Silent())
        trainer.run()
        windows = [
            each for layer in trainer.store.layers() for each in trainer.store.routing_history(layer)[-_LAST_WINDOWS:]
        ]
        violation = float(np.mean([each.max_violation for each in windows])) if windows else None
        found = Outcome(trainer.evaluate().loss, violation, time.monotonic() - start)
        trainer.close("finished")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps({"config": json.loads(told)} | asdict(found)).encode())
    return found
