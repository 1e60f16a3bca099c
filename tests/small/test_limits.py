"""Under a limit that the system enforces: a model with four times as many bytes of experts answers all the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
LIMIT = 48 * 2**20  # bytes of data beyond what the process has with torch imported
MEMORY = 16 * 2**20  # of these, for experts

# RLIMIT_DATA counts what a process may write to and shares with nobody: heap, anonymous memory, stacks of threads. It
# does not count files that are read, nor the system's cache of them, which gives way when memory is needed.
PROGRAM = """
import json, resource, sys
import torch
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.models.generate import generate
from equipoise.models.run_files import load
from equipoise.small import SmallConfig, load_small

torch.set_num_threads(1)
moe = MoEConfig(num_experts=2, hidden_dim=16)
tiny = Decoder(DecoderConfig(vocab_size=300, dim=16, num_layers=1, num_heads=1, hidden_dim=16, max_seq_len=32, moe=moe))
generate(tiny, torch.zeros(1, 4, dtype=torch.int64), 4)  # what is imported and made with the first forward is there
run, how, limit, memory = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if limit:
    data = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (data + limit, data + limit))
if how == "resident":
    model, offload = load(run).model, None
    for layer in model.moe_layers.values():
        layer.experts.backend = "lean"
else:
    small = load_small(run, SmallConfig(memory=memory))
    model, offload = small.loaded.model, small.offload
tokens = generate(model, torch.arange(1, 9)[None], 16, temperature=0.7, seed=1)
counts = None if offload is None else offload.counts()
print(json.dumps([tokens.tolist(), None if counts is None else [counts.most_bytes, counts.evicted]]))
"""

MAKE = """
import json, sys
from pathlib import Path
import torch
from equipoise.disk.checkpoint import save_checkpoint
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.models.tokenizer import Tokenizer
from equipoise.routing import TopK

torch.manual_seed(0)
moe = MoEConfig(num_experts=16, hidden_dim=1024, router=TopK(k=2))
config = DecoderConfig(vocab_size=300, dim=256, num_layers=4, num_heads=4, hidden_dim=64, max_seq_len=64, moe=moe)
folder = Path(sys.argv[1])
folder.mkdir()
(folder / "config.json").write_text(json.dumps({"name": "x", "model": json.loads(config.to_json())}))
Tokenizer("bytes", {bytes([b]): b for b in range(256)}).save(folder)
model = Decoder(config)
save_checkpoint(folder / "checkpoints", 1, {"model": dict(model.state_dict())}, {})
print(sum(p.nbytes for layer in model.moe_layers.values() for p in layer.experts.parameters()))
"""


def python(program, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SRC), "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.mark.slow
def test_four_times_the_limit(tmp_path):
    run = tmp_path / "run"
    num_bytes = int(python(MAKE, run).stdout)
    assert num_bytes == 4 * LIMIT == 4 * 16 * 3 * 256 * 1024 * 4
    free = python(PROGRAM, run, "resident", 0, 0)
    expected = json.loads(free.stdout)[0]
    limited = python(PROGRAM, run, "resident", LIMIT, 0)
    assert limited.returncode != 0
    assert "not enough memory" in limited.stderr or "MemoryError" in limited.stderr or "allocate" in limited.stderr
    small = python(PROGRAM, run, "offloaded", LIMIT, MEMORY)
    assert small.returncode == 0, small.stderr
    tokens, (most, evicted) = json.loads(small.stdout)
    assert tokens == expected
    assert most <= MEMORY
    assert evicted > 0
