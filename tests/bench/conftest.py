"""A small claims' model for the tests of its runs and probes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from equipoise.bench.claims.arms import BASE
from equipoise.bench.claims.claim import Arm
from equipoise.train.config import DataConfig


@pytest.fixture
def one_thread():
    """As trainings of claims run: two processes share two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """The claims' model, smaller, on a little text of our own; six steps."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = [f"word{i} " for i in range(60)]
    rows = [
        {"text": "".join(rng.choice(words[30 * (i % 2) :][:40], 120)), "domain": ("even", "odd")[i % 2]}
        for i in range(80)
    ]
    path = folder / "text.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    moe = replace(BASE.model.moe, num_experts=4, hidden_dim=16)
    return replace(
        BASE,
        model=replace(BASE.model, dim=16, num_layers=3, num_heads=2, hidden_dim=32, moe=moe),
        data=DataConfig(corpus=str(path), vocab_size=300, seq_len=32, val_fraction=0.2, cache_dir=folder / "cache"),
        steps=6,
        batch_size=4,
        eval_batches=2,
        watch_every=2,
        interference_every=3,
    )


@pytest.fixture
def arm(config):
    return Arm("small", config)
