"""The benchmarks run, compare what they time, and say what they left out. Their numbers are not judged here."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks.layer import ERROR_LIMITS, available, checked_layers
from benchmarks.memory import lean_formula, saved_for_backward
from benchmarks.monitor import Size, window_memory
from benchmarks.variants import (
    SHAPES,
    VARIANTS,
    LeftOutError,
    Shape,
    equipoise_moe,
    make_problem,
    needs_memory_for_copies,
)

from equipoise.bench.harness import Effort, Variant, ratio, relative_error, require_same, spread, time_side_by_side
from equipoise.bench.report import shown
from equipoise.ops.native.experts import why_not_native

ROOT = Path(__file__).parents[2]
BF16_LAYER = [torch.empty(size, dtype=torch.bfloat16) for size in ((1, 64), (4, 64, 64), (4, 64, 32))]
TINY = Shape("tiny", dim=32, hidden_dim=16, num_experts=4, top_k=2)


def run_benchmark(module):
    """What `python -m benchmarks.<module> --smoke --json` prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", f"benchmarks.{module}", "--smoke", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows_by_name(table):
    """Rows under the cell of their first column."""
    return {next(iter(row.values())): row for row in table["rows"]}


def test_layer_benchmark_reports_every_variant_and_that_they_agree():
    report = run_benchmark("layer")
    assert report["provenance"]["command"] == "python -m benchmarks.layer --smoke --json"
    assert {"cpu", "cores", "threads", "torch", "date"} <= report["provenance"].keys()
    assert len(report["tables"]) == 2 * (3 + 3)  # two shapes: training, prefill, memory, three decode sizes
    errors = [row["error"] for table in report["tables"] for row in table["rows"] if "error" in row]
    assert len(errors) == sum(len(table["rows"]) for table in report["tables"]) * 5 // 6  # all but the memory tables
    assert max(errors) <= ERROR_LIMITS[torch.bfloat16]
    left_out = " ".join(report["notes"])
    for first in (0, 6):
        training, _, memory = (rows_by_name(table) for table in report["tables"][first : first + 3])
        for candidate in VARIANTS:
            assert candidate.name in training or candidate.name in left_out
        ours = f"equipoise {'lean' if why_not_native(*BF16_LAYER, 'swiglu') else 'native'}"
        assert training[ours]["time / equipoise"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        least = min(row["MiB"] for row in memory.values())
        assert memory["equipoise lean"]["MiB"] == memory["equipoise native"]["MiB"] == least


def test_monitor_benchmark_reports_both_figures_the_flush_and_its_memory():
    steps, flushes = run_benchmark("monitor")["tables"]
    assert len(steps["rows"]) == 4  # a recipe, a layer, transformers' training and decoding
    for row in steps["rows"]:
        share = row["share of the step [%]"]
        assert 0 < share["low"] <= share["median"] <= share["high"] < 100
        assert row["watched / unwatched"]["median"] > 0
    names = ["512 tokens, enough for an opinion", "16 tokens, too few for an opinion"]
    assert list(rows_by_name(flushes)) == names
    assert all(row["time [ms]"]["low"] > 0 for row in flushes["rows"])


def test_the_window_of_a_large_model_stays_below_64_mib():
    """Bytes, not seconds: 61 layers of 256 experts."""
    measured, formula = window_memory(Size(61, 256))
    assert formula <= measured < 64


def test_breaker_benchmark_reports_both_granularities_and_the_record():
    guarding, record = run_benchmark("breaker")["tables"]
    assert [row["granularity"] for row in guarding["rows"]] == ["layer", "expert"] * 2
    for row in guarding["rows"]:
        share = row["share of the forward [%]"]
        assert 0 < share["low"] <= share["median"] <= share["high"] < 100
        assert row["guarded / unguarded"]["median"] > 0
        assert row["clocks [ms per forward]"]["low"] > 0
    assert [row["groups"] for row in record["rows"]] == [2, 16]
    assert all(row["record [us]"]["median"] > 0 for row in record["rows"])


def test_detection_benchmark_notices_every_strong_fault_and_shows_where_that_ends():
    *strong, faults, family = run_benchmark("detection")["tables"]
    assert [table["title"].split(", ")[1] for table in strong] == ["relative", "with baselines", "absolute"]
    for table in strong:
        assert rows_by_name(table)["all"]["faults"] == 8  # 2 shapes, 2 kinds of batch, 2 seeds
    for table in strong[:2]:
        assert rows_by_name(table)["all"]["caught in 3 windows [%]"] == 100
    assert rows_by_name(strong[0])["all"]["false alarms"] == 0
    by_fault = rows_by_name(faults)
    assert len(by_fault) == 8
    shares = [by_fault[f"+{logits} logits"]["relative, ever [%]"] for logits in (20, 10, 5, 3, 2, 1)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 100
    assert shares[-1] < 100
    assert by_fault["one dead expert"]["relative, ever [%]"] == 100
    assert by_fault["half of the experts starve"]["relative, ever [%]"] == 100
    for row in family["rows"]:
        assert row["collapse [%]"] <= 5
        assert row["windows with a finding"] == 0


def test_learning_benchmark_compares_a_run_with_its_records():
    (table,) = run_benchmark("learning")["tables"]
    [row] = table["rows"]
    assert row["flushes compared"] == 9 + 3  # of steps 55 to 95 and 105 to 115
    assert row["largest PSI"] > 0
    assert row["largest growth of std"] > 1
    assert row["records"] == 3


def test_memory_benchmark_finds_that_recomputing_keeps_less():
    (table,) = run_benchmark("memory")["tables"]
    for row in table["rows"]:
        assert 0 < row["recomputed [MiB]"] < row["kept [MiB]"]


def test_placement_benchmark_compares_with_eplb_on_every_kind_of_traffic():
    unseen, trades, planning = run_benchmark("placement")["tables"]
    names = [f"{kind}, {ranks} ranks" for kind in ("bundles", "domains", "trained model") for ranks in (4, 8)]
    assert list(rows_by_name(unseen)) == list(rows_by_name(trades)) == names
    for row in unseen["rows"]:
        assert min(row["balance: even"], row["EPLB"], row["planned"]) >= 1
        assert row["aim reached"] in ("yes", "no")
    assert rows_by_name(trades)["bundles, 4 ranks"]["10 % fuller [%]"] > 5
    assert planning["rows"][0]["time [s]"]["median"] > 0


def test_without_transformers_its_rows_are_left_out_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # Python's own way of saying: not there
    problem = make_problem(TINY, 8, torch.float32)
    can_run, notes = available(problem, 8)
    assert list(can_run) == [candidate.name for candidate in VARIANTS if "transformers" not in candidate.name]
    assert len(notes) == 3
    assert all("pip install 'equipoise[bench]'" in note for note in notes)


def test_what_would_copy_too_much_is_left_out():
    # 4096 tokens x 8 experts x 2 x 512 x 256 weights x 2 bytes = 16 GiB
    with pytest.raises(LeftOutError, match=r"transformers|16 GiB with 4096 fine tokens"):
        needs_memory_for_copies(SHAPES["fine"], 4096, torch.bfloat16)


def test_variants_agree_in_fp32():
    problem = make_problem(TINY, 16, torch.float32)
    can_run, _ = available(problem, 16)
    layers, errors = checked_layers(problem, can_run)
    assert layers.keys() == errors.keys() == can_run.keys()


def test_a_variant_that_computes_something_else_is_refused():
    problem = make_problem(TINY, 16, torch.float32)
    wrong = replace(VARIANTS[0], build=lambda p: equipoise_moe(replace(p, up_EHD=-p.up_EHD), backend="lean"))
    with pytest.raises(
        ValueError, match=r"equipoise lean: expected the same result .* 1e-05, got .*; mend the variant"
    ):
        checked_layers(problem, {wrong.name: wrong})


def test_tokens_are_clear_of_ties():
    problem = make_problem(TINY, 64, torch.bfloat16)
    logits_TE = problem.x_TD @ problem.router_ED.t()  # rounded to bf16
    exact_TE = problem.x_TD.float() @ problem.router_ED.float().t()
    assert torch.equal(logits_TE.topk(2).indices.sort().values, exact_TE.topk(2).indices.sort().values)


def test_variants_alternate_and_are_reset_around_each_run():
    log = []
    variants = [Variant(name, partial(log.append, name), partial(log.append, "reset")) for name in "AB"]
    seconds = time_side_by_side(variants, Effort(rounds=2, warmup=1))
    assert log == ["reset", "A", "reset", "reset", "B", "reset"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"A": 2, "B": 2}


def test_short_runs_are_repeated_to_fill_a_round():
    calls = []
    time_side_by_side([Variant("A", partial(calls.append, 1))], Effort(rounds=1, warmup=1, min_seconds=1e-3))
    assert len(calls) > 2


def test_ratios_are_taken_round_by_round():
    # Both slow down together: the ratio is 2 in each round, though the times overlap.
    assert ratio({"a": (2.0, 20.0, 4.0), "b": (1.0, 10.0, 2.0)}, "a", "b") == spread((2.0, 2.0, 2.0))


def test_relative_error_is_the_largest_of_the_pairs():
    # |(3, 4) - (3, 3)| / |(3, 3)| = 1 / sqrt(18)
    pairs = [torch.tensor([1.0]), torch.tensor([3.0, 4.0])], [torch.tensor([1.0]), torch.tensor([3.0, 3.0])]
    assert relative_error(*pairs) == pytest.approx(18**-0.5)


def test_nan_is_not_the_same():
    with pytest.raises(ValueError, match="got nan"):
        require_same("broken", [torch.tensor([float("nan")])], [torch.ones(1)], limit=1.0)


def test_saved_bytes_count_each_storage_once_and_no_parameters():
    w = torch.ones(4, 4, requires_grad=True)
    x = torch.ones(8, 4, requires_grad=True)
    # x * x keeps x (twice, one storage: 128 bytes); the product keeps x * x (128 bytes) and w, a parameter.
    assert saved_for_backward(lambda: (x * x) @ w, [w]) == 256


def test_lean_keeps_what_its_formula_says_and_the_routers_small_things():
    shape, num_tokens = Shape("wide", dim=256, hidden_dim=128, num_experts=4, top_k=2), 64
    problem = make_problem(shape, num_tokens, torch.bfloat16)
    layer = equipoise_moe(problem, backend="lean")
    x_TD = problem.x_TD.clone().requires_grad_()
    kept = saved_for_backward(partial(layer.forward, x_TD), layer.module.parameters())
    formula = lean_formula(num_tokens, 256, 128, 2, itemsize=2)
    assert formula == 2 * 64 * 256 + 4 * 64 * 2 * 128
    assert formula <= kept < formula + num_tokens * 256  # the rest is of size T K and T E: here under 256 bytes a token


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "-"),
        (1234.4, "1234"),
        (12.34, "12.3"),
        (0.0, "0.00"),
        (1.0, "1.00"),
        (0.00123, "1.2e-03"),
        (spread((2.0, 2.0)), "2.00 [2.00, 2.00]"),
    ],
)
def test_cells_show_three_digits(cell, text):
    assert shown(cell) == text
