"""A run folder of a small model, with two checkpoints."""

import json
from pathlib import Path

import pytest
from tests.small.models import config, model, tokens

from equipoise.disk.checkpoint import save_checkpoint
from equipoise.models.run_files import write_held_out
from equipoise.models.tokenizer import Tokenizer


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"name": "x", "model": json.loads(config(vocab_size=300).to_json())})
    )
    Tokenizer("bytes", {bytes([b]): b for b in range(256)}).save(folder)
    write_held_out(folder, tokens(4, 17))
    for step in (1, 2):
        state = model(step, vocab_size=300).state_dict()
        save_checkpoint(folder / "checkpoints", step, {"model": dict(state), "other": {}}, {})
    return folder
