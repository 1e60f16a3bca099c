"""The serving benchmarks run against a real server, check the answers, and come to a verdict; times are not judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.serve_llama_cpp import neighbours
from benchmarks.serve_mixtral import LOGITS_LIMIT, check_maps, logits_error, mixtral_of
from benchmarks.serve_peers import SMOKE_SIZES, Workload, agreement, workload
from benchmarks.serving import random_model

from equipoise.models.config import DecoderConfig
from equipoise.models.decoder import Decoder

ROOT = Path(__file__).parents[2]
[CONFIG] = SMOKE_SIZES.values()


def run_benchmark(module, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", f"benchmarks.{module}", "--smoke", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


def test_peers_answer_alike_and_are_timed():
    peers = ("equipoise serve, HTTP", "transformers generate, one batch")
    throughput, alone, by_batch = run_benchmark("serve_peers", "--only", *peers)["tables"]
    assert [row["engine"] for row in throughput["rows"]] == ["equipoise engine", *peers]
    assert [row["same text [%]"] for row in throughput["rows"]] == [100, 100, 100]
    assert all(row["to the first token [ms]"]["low"] > 0 for row in alone["rows"])
    assert [(row["batch"], row["engine"]) for row in by_batch["rows"]] == [
        (batch, engine) for batch in (1, 2) for engine in ("equipoise engine", peers[1])
    ]


def test_a_mixtral_has_the_same_logits():
    model = random_model(CONFIG, torch.float32)
    mixtral = mixtral_of(model)
    assert logits_error(model, mixtral) <= LOGITS_LIMIT
    mixtral.model.layers[0].mlp.gate.weight.data.neg_()
    assert logits_error(model, mixtral) > 100 * LOGITS_LIMIT


def test_what_is_no_mixtral_is_refused():
    dense = DecoderConfig(vocab_size=300, dim=8, num_layers=1, num_heads=2, hidden_dim=8, max_seq_len=8)
    with pytest.raises(ValueError, match=r"model: expected modern style, MoE in every layer, .* a Mixtral has nothing"):
        check_maps(dense)


def test_rows_of_queries_become_neighbours():
    # Two heads of four rows each: (0, 2) and (1, 3) turn together, so they come to stand side by side.
    rows = torch.arange(8)[:, None]
    assert neighbours(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_an_engine_that_answers_something_else_is_refused():
    work = workload(CONFIG.vocab_size, smoke=True)
    ours = {"equipoise engine": lambda asks: ["aaaa", "bbbb", "cccc"]}
    near = {"near": lambda asks: ["aaaa", "bbxx", "cxxx"]}
    assert agreement(ours | near, work.mixed, must_agree=True)["near"] == pytest.approx(100 * 7 / 12)
    wrong = {"wrong": lambda asks: ["aaaa", "xbbb", "xccc"]}
    with pytest.raises(ValueError, match=r"wrong: expected 90% of the answers to begin like ours, got 33%"):
        agreement(ours | wrong, work.mixed, must_agree=True)


def test_the_workload_is_the_same_each_time_and_never_sends_bytes():
    assert workload(2048, smoke=False) == workload(2048, smoke=False)
    work: Workload = workload(2048, smoke=False)
    assert len(work.mixed) == 16
    assert all(256 <= id < 2047 for ask in work.mixed for id in ask.prompt)


def test_random_weights_are_exact_in_bf16():
    ours: Decoder = random_model(CONFIG, torch.float32)
    rounded = random_model(CONFIG, torch.bfloat16)
    for mine, theirs in zip(ours.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(mine, theirs.float())
