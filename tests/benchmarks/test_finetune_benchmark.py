"""The benchmark of ways to tune runs, begins every arm with the same weights, and says what each one trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.finetune import ARMS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_compares_arms_that_begin_alike():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    arms = ["router only", "LoRA, rank 8, rate x 10"]
    command = [sys.executable, "-m", "benchmarks.finetune", "--smoke", "--json", "--domains", "prose", "cpp", "--arms"]
    done = subprocess.run([*command, *arms], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (table,) = json.loads(done.stdout)["tables"]
    before, router, lora = table["rows"]
    assert [row["tuned"] for row in table["rows"]] == ["before", *arms]
    assert set(arms) <= set(ARMS)
    assert router["weights trained"] == 2 * 8 * 64  # layers, experts, dim
    # rank 8: attention (in + out) of q, k, v, o; in each of 8 experts those of both products; two layers
    assert lora["weights trained"] == 2 * 8 * ((128 + 96 + 96 + 128) + 8 * ((128 + 64) + (64 + 64)))
    assert before["agreement"] == 1.0
    assert all(row["ppl cpp"] > 1 and row["ppl prose"] > 1 for row in table["rows"])
