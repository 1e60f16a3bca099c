"""The grouping benchmark runs, gives both ways the same work, and counts what it says it counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.serve_grouping import Workload, play, side_by_side, widened
from tests.serve.small import TOKENIZER, tiny_model

from equipoise.models.run_files import Loaded
from equipoise.routing import Hash

ROOT = Path(__file__).parents[2]
PROMPTS = tuple(tuple(range(n, n + 12)) for n in range(0, 90, 10))


@pytest.fixture(scope="module")
def loaded():
    return Loaded(tiny_model(), TOKENIZER, None, Path("run"), Path("run"))


def run_benchmark(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "benchmarks.serve_grouping", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_smoke(tmp_path):
    done = run_benchmark("--smoke", "--json", "--markdown", str(tmp_path / "grouping.md"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    sizes, layers = report["tables"]
    assert [row["decode_batch"] for row in sizes["rows"]] == ["2", "4"]
    assert len(layers["rows"]) == 2 * 2
    for row in sizes["rows"]:
        assert 1 <= row["grouped"] <= 8
        assert row["grouped / in turn"]["median"] > 0
    assert {"command", "cpu", "torch", "equipoise"} <= report["provenance"].keys()
    assert "| decode_batch | experts, in turn |" in (tmp_path / "grouping.md").read_text()


def test_a_run_is_needed():
    done = run_benchmark()
    assert done.returncode == 2
    assert "run: expected a run folder, such as `equipoise train demo` writes; or --smoke" in done.stderr


def test_both_ways_do_the_same_work(loaded):
    [(turn, grouped)] = side_by_side(loaded, Workload(PROMPTS, 6, 4), 3, rounds=1)
    assert turn.answers == grouped.answers
    assert turn.num_tokens == grouped.num_tokens == len(PROMPTS) * 5  # the first token comes with the prompt
    assert turn.distinct_SL.shape[1] == grouped.distinct_SL.shape[1] == 2
    assert turn.longest_wait == 2  # nine in threes
    assert 2 < grouped.longest_wait <= 4 + len(PROMPTS) // 3


def test_fewer_experts_where_answers_are_of_two_kinds():
    """Even tokens go to the experts 0 and 1, odd ones to 2 and 3, and a token follows itself: two answers in a step
    touch 2 experts when they are of one kind, 4 when they are not."""
    model = tiny_model(router=Hash(vocab_size=257, k=2), num_layers=1)
    with torch.no_grad():
        model.layers[0].mlp.router.table_VK.copy_(torch.tensor([[0, 1], [2, 3]]).repeat(129, 1)[:257])
        model.layers[0].self_attn.o_proj.weight.zero_()
        model.layers[0].mlp.experts.down_proj.zero_()
    loaded = Loaded(model, TOKENIZER, None, Path("run"), Path("run"))
    work = Workload(tuple((8 * n + kind,) for n in range(3) for kind in (0, 1)), 6, 10)
    turn, grouped = (play(loaded, work, 2, group) for group in (False, True))
    assert turn.distinct_SL.mean() > 2.9
    assert grouped.distinct_SL[:-1].mean() < 2.5
    assert np.all(grouped.distinct_SL >= 2)


def test_wider_experts_give_the_same_answers(loaded):
    wide = widened(loaded, 3)
    for layer in wide.model.layers:
        assert layer.mlp.experts.down_proj.shape[2] == 3 * loaded.model.layers[0].mlp.experts.down_proj.shape[2]
    work = Workload(PROMPTS, 6, 4)
    narrow, same = (play(each, work, 3, group=True) for each in (loaded, wide))
    assert same.answers == narrow.answers
    np.testing.assert_array_equal(same.distinct_SL, narrow.distinct_SL)
