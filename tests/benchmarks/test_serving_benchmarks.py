"""The serving benchmarks run against a real server, check the answers, and come to a verdict; times are not judged."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.serve_engines import engine, make_subject, one_batch
from benchmarks.serve_events import Watched, ills
from benchmarks.serve_llama_cpp import neighbours
from benchmarks.serve_load import as_before
from benchmarks.serve_overhead import PARTS
from benchmarks.serve_peers import SMOKE_SIZES, Workload, agreement, workload
from benchmarks.serve_soak import gauge, slope_per_hour
from benchmarks.serve_traffic import Known, Span, check, wrong_with
from benchmarks.serving import random_model
from benchmarks.serving_client import Told

from equipoise.bench.peers.mixtral import LOGITS_LIMIT, check_maps, logits_error, mixtral_of
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
    throughput, lasting, alone, by_batch = run_benchmark("serve_peers", "--only", *peers)["tables"]
    assert [row["engine"] for row in throughput["rows"]] == ["equipoise engine", *peers]
    assert [row["same text [%]"] for row in throughput["rows"]] == [100, 100, 100]
    assert [row["engine"] for row in lasting["rows"]] == ["equipoise engine", *peers]
    assert all(row["answer tokens/s"]["low"] > 0 for row in lasting["rows"])
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
    for asks in work.lasting.values():
        assert len(asks) == 64
        assert all(len(ask.prompt) + ask.max_tokens <= 256 for ask in asks)


def test_as_many_requests_are_open_as_there_are_clients(tmp_path):
    """All answers are those of one at a time, and no more than two are open."""
    subject = make_subject("smoke", CONFIG, torch.float32, tmp_path, max_running=4)
    asks = workload(CONFIG.vocab_size, smoke=True).mixed
    with engine(subject) as run, one_batch(subject) as batches:
        alone = run(asks, 1)
        assert run(asks, 2) == run(asks) == alone
        assert batches(asks, 2) == batches(asks) == alone


def test_random_weights_are_exact_in_bf16():
    ours: Decoder = random_model(CONFIG, torch.float32)
    rounded = random_model(CONFIG, torch.bfloat16)
    for mine, theirs in zip(ours.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(mine, theirs.float())


# ------------------------------------------------------------------------------------------------- load with faults


def test_load_with_faults_loses_nothing_and_says_what_it_checked():
    must, sums, latency, mended = run_benchmark("serve_load")["tables"]
    assert {row["holds"] for row in must["rows"]} == {"yes"}
    number = {row[""]: row["number"] for row in sums["rows"]}
    kinds = ("finished", "left by their client", "refused after SIGTERM", "failed", "lost")
    assert number["requests sent"] == sum(number[kind] for kind in kinds)
    assert number["compared with the slow twin"] > 0
    assert number["left by their client"] > 0
    assert number["answers checked for their own marks"] == number["finished"]
    assert len(latency["rows"]) == 3 * len(mended["rows"])
    said = {row["event"]: row["said"] for row in mended["rows"]}
    assert "corrupt: sha256" in said["damaged checkpoint"]
    assert "held-out loss rose" in said["worse checkpoint"]
    assert "step-000020" in said["good reload"]


class _Prompts:
    """Decodes ids to letters."""

    def decode(self, ids):
        return "".join(chr(id) for id in ids)


def _told(seed=7, *, text="abcd", began=1.0, ended=2.0, **changes):
    body = {"prompt": [97, 98], "max_tokens": 2, "seed": seed, "echo": True}
    usage = {"prompt_tokens": 2, "completion_tokens": 2}
    told = Told(body, began, ended, [began, ended], text, f"id-{seed}", "length", 200, usage=usage, seed=seed)
    for name, value in changes.items():
        setattr(told, name, value)
    return told


def test_an_answer_of_its_own_is_not_wrong():
    assert wrong_with(_told(), _Prompts()) == ""


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"text": "xbcd"}, "begins with 'xbcd', its prompt is 'ab'"),
        ({"usage": {"prompt_tokens": 3, "completion_tokens": 2}}, r"has \(3, 2\) tokens, expected 2 and 2"),
        ({"usage": {"prompt_tokens": 2, "completion_tokens": 1}}, r"has \(2, 1\) tokens, expected 2 and 2"),
    ],
)
def test_another_requests_answer_is_noticed(changes, match):
    told = _told()
    told.__dict__.update(changes)
    assert re.search(match, wrong_with(told, _Prompts()))


def test_another_requests_seed_is_noticed():
    told = _told()
    told.seed = 8
    assert wrong_with(told, _Prompts()) == "seed 7: has the seed 8"


def test_answers_of_the_pool_are_compared_unless_the_model_was_another():
    right, wrong, other = _told(1), _told(2, began=3.0, ended=4.0), _told(3, began=5.0, ended=6.0)
    pool = [Known(right.body, "abcd"), Known(wrong.body, "abxx"), Known(other.body, "abyy")]
    checked = check([right, wrong, other], pool, _Prompts(), [Span(4.5, 5.5)])
    assert (checked.num_own, checked.num_twin, checked.num_other) == (3, 2, 1)
    assert checked.wrong == ("seed 2: 'abcd', the slow twin says 'abxx'",)
    assert len(check([right, wrong, other], pool, _Prompts(), []).wrong) == 2


def test_two_answers_with_one_id_are_noticed():
    told = [_told(1), _told(2, id="id-1")]
    assert check(told, [], _Prompts(), []).wrong == ("1 answers have the id of another",)


def test_latency_is_as_before_when_a_window_is():
    # A gap of 10 ms each 0.1 s; from 10 s to 14 s of 100 ms. Noticed at 11 s: the window from 14 s on is the first.
    pairs = np.array([(at / 10, 0.1 if 100 <= at < 140 else 0.01) for at in range(300)])
    event = Watched("slow", began=10.0, detected=11.0, until=29.0)
    assert as_before(pairs, event, 4.0) == pytest.approx(14.0 + 4.0 - 11.0)
    assert as_before(pairs, Watched("slow", began=10.0, detected=11.0, until=16.0), 4.0) is None
    lasts = Watched("slow", began=10.0, detected=11.0, ended=14.0, until=29.0, lasts=True)
    assert as_before(pairs, lasts, 4.0) == pytest.approx(4.0)


def test_only_what_was_not_there_before_is_an_events_doing():
    alerts = [
        {"layer": "layers.0.mlp", "rule": "collapse", "severity": "critical"},
        {"layer": "layers.0.mlp", "rule": "load_drift", "severity": "warning"},
    ]
    state = {"alerts": alerts, "breaker": {"layers.0.mlp": "closed", "layers.1.mlp": "half_open"}}
    assert ills(state) == {"layers.0.mlp:collapse", "breaker layers.1.mlp"}
    assert ills({"alerts": [], "breaker": None}) == frozenset()


# ------------------------------------------------------------------------------------------------- soak, overhead


def test_the_soak_leaves_nothing_behind():
    must, figures = run_benchmark("serve_soak")["tables"]
    assert {row["holds"] for row in must["rows"]} == {"yes"}
    number = {row[""]: row["number"] for row in figures["rows"]}
    assert number["requests sent"] == number["finished"] + number["left by their client"] > 0
    assert number["answers compared with the slow twin"] > 0
    assert number["memory at the end [MiB]"] > 0


def test_growth_is_the_slope_of_the_line():
    # 3 MiB in a tenth of an hour, whatever is added
    assert slope_per_hour([0, 180, 360], [100.0, 101.5, 103.0]) == pytest.approx(30.0)


def test_a_gauge_is_read_and_missed():
    text = "# HELP equipoise_serve_open_requests ...\nequipoise_serve_open_requests 3.0\n"
    assert gauge(text, "open_requests") == 3
    with pytest.raises(ValueError, match="/metrics: expected equipoise_serve_running, found none"):
        gauge(text, "running")


def test_every_part_of_care_is_timed_beside_the_engine_alone():
    [table] = run_benchmark("serve_overhead")["tables"]
    assert [row["with"] for row in table["rows"]] == list(PARTS)
    assert table["rows"][0]["/ engine alone"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert all(row["step [ms]"]["low"] > 0 for row in table["rows"])


def test_over_ranks_the_same_requests_are_timed():
    """By torchrun, with two ranks of this machine."""
    [table] = run_benchmark("serve_ranks")["tables"]
    assert table["rows"]
    for row in table["rows"]:
        assert row["ranks"] == 2
        assert all(cell["median"] > 0 for name, cell in row.items() if name.startswith(("/", "over ranks")))
