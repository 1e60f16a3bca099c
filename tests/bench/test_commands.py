"""`equipoise bench ...` in small: tables, JSON, pictures, mistakes. No time is judged here."""

import json
import os
import subprocess
import sys

import pytest
import torch

from equipoise.bench.decode import touched_experts, windows
from equipoise.bench.fit import power_law
from equipoise.bench.harness import Spread
from equipoise.bench.monitor import Size, window_memory
from equipoise.bench.plot import write_picture
from equipoise.bench.problem import Shape, make_problem
from equipoise.bench.report import Report, Table
from equipoise.bench.train import sized
from equipoise.cli import main
from equipoise.commands import bench
from equipoise.commands.bench_run import Output, run_bench
from equipoise.layer.experts import backend_for
from equipoise.models.decoder import Decoder
from equipoise.train.recipes import recipe

PNG = b"\x89PNG\r\n"


def measured(folder, *words):
    """What the command writes as JSON."""
    path = folder / "result.json"
    with pytest.raises(SystemExit) as end:
        main(["bench", *words, "--quick", "--out", str(path)])
    assert end.value.code == 0
    return json.loads(path.read_text())


def by_name(table):
    return {next(iter(row.values())): row for row in table["rows"]}


def positive(report):
    """Every spread is in order and above 0."""
    spreads = [cell for t in report["tables"] for row in t["rows"] for cell in row.values() if isinstance(cell, dict)]
    assert spreads
    return all(0 < cell["low"] <= cell["median"] <= cell["high"] for cell in spreads)


def backend_of_bf16():
    """What "auto" takes here: native where this machine can, and then the rows don't matter."""
    x, up, down = (torch.empty(size, dtype=torch.bfloat16) for size in ((1, 64), (4, 64, 64), (4, 64, 32)))
    return backend_for("auto", x, up, down)[0]


def test_layer_compares_each_variant_and_writes_all_forms(tmp_path):
    picture, page = tmp_path / "layer.png", tmp_path / "layer.md"
    report = measured(
        tmp_path, "layer", "--shape", "fine", "64,64,4,2", "--picture", str(picture), "--markdown", str(page)
    )
    assert positive(report)
    assert len(report["tables"]) == 2 * 3  # training, memory, inference
    training, memory, _ = (by_name(table) for table in report["tables"][:3])
    assert training[f"equipoise {backend_of_bf16()}"]["time / equipoise"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert "equipoise few" not in training  # it is for decoding
    least = min(row["MiB"] for row in memory.values())
    assert memory["equipoise lean"]["MiB"] == memory["equipoise native"]["MiB"] == least
    assert 0 < max(row["error"] for row in training.values()) < 2e-2
    assert {"cpu", "threads", "torch", "transformers", "date"} <= report["provenance"].keys()
    assert picture.read_bytes().startswith(PNG)
    assert page.read_text().startswith("### fine: T=256 D=64")


def test_decode_has_every_backend_quantised_experts_and_the_memory(tmp_path):
    report = measured(tmp_path, "decode", "--no-model", "--tokens", "1", "4")
    assert positive(report)
    one, four = (by_name(table) for table in report["tables"])
    wanted = {
        "equipoise auto",
        "equipoise few",
        "equipoise int8",
        "equipoise int4",
        "transformers eager",
        "memory, read",
    }
    assert wanted <= one.keys()
    assert one["equipoise auto"]["speed / equipoise"]["median"] == 1
    assert four["equipoise int8"]["error"] < 3e-2 < four["equipoise int4"]["error"] < 0.25


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("words", [("layer",), ("decode", "--no-model")], ids=" ".join)
def test_without_a_gpu_cuda_is_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", *words, "--quick", "--device", "cuda"])
    assert ended.value.code == 2
    assert "device: expected a GPU for cuda, got none that torch sees; use --device cpu" in capsys.readouterr().err


def test_decode_of_a_whole_model(tmp_path):
    report = measured(tmp_path, "decode", "--tokens", "1", "--dtype", "fp32")  # in fp32 all must say the same
    models = [by_name(table) for table in report["tables"] if table["title"].startswith("the model of")]
    assert len(models) == 2
    peers = {f"transformers {name}" for name in ("eager", "grouped_mm", "batched_mm")}
    assert all(rows.keys() == {"equipoise"} | peers for rows in models)


def test_monitor_reports_both_figures_and_the_flush(tmp_path):
    steps, flushes = measured(tmp_path, "monitor")["tables"]
    assert len(steps["rows"]) == 5  # a recipe, its decoding, a layer, transformers' training and decoding
    for row in steps["rows"]:
        share = row["share of the step [%]"]
        assert 0 < share["low"] <= share["median"] <= share["high"] < 100
    names = ["512 tokens, enough for an opinion", "16 tokens, too few for an opinion"]
    assert list(by_name(flushes)) == names


def test_the_window_of_a_large_model_stays_below_64_mib():
    """Bytes, not seconds: 61 layers of 256 experts."""
    measured, formula = window_memory(Size(61, 256))
    assert formula <= measured < 64


def test_scaling_has_its_curves_and_what_an_import_loads(tmp_path):
    picture = tmp_path / "scaling.png"
    report = measured(tmp_path, "scaling", "--only", "tokens", "experts", "disk", "--picture", str(picture))
    tokens, experts, disk = (by_name(table) for table in report["tables"])
    assert list(tokens) == ["T=64", "T=128", "T=256"]
    assert list(experts) == ["E=4", "E=8", "E=16"]
    assert list(disk) == ["1 MB", "2 MB", "4 MB"]
    assert all(row["kept / formula"] >= 1 for row in tokens.values())
    assert "Time grows as T^" in report["tables"][0]["note"]
    assert picture.read_bytes().startswith(PNG)


def test_a_process_of_its_own_trains_and_prints_json_alone():
    command = [sys.executable, "-m", "equipoise", "bench", "train", "--quick", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["provenance"]["command"] == "equipoise bench train --quick --json"
    (table,) = report["tables"]
    assert {"equipoise, the step alone", "equipoise, the whole loop"} <= by_name(table).keys()
    assert sum(name.startswith("transformers Trainer") for name in by_name(table)) == 3
    assert positive(report)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layer", "--shape", "finer"], "shape: expected coarse, fine, olmoe, decode, qwen3, mixtral, or D,F,E,K"),
        (["layer", "--rounds", "0"], "rounds: expected at least 1, got 0"),
        (["layer", "--quick", "--only", "nothing"], "only: 'nothing' is in none of equipoise lean"),
        (["decode", "--tokens", "0"], "tokens: expected numbers of at least 1"),
        (["scaling", "--quick", "--only", "disks"], "only: expected some of tokens, experts, disk, import, got disks"),
    ],
)
def test_a_mistake_is_said_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["layer", "decode", "train", "monitor", "routing", "scaling"])
def test_help_says_what_is_compared_and_how_to_read_it(name):
    text = getattr(bench, name).__doc__
    assert "How to read it:" in text
    assert "minutes" in text


def test_ctrl_c_shows_what_was_measured_by_then(capsys):
    def stopped(effort):
        yield Table("first", ("what", "ms"), (("a", Spread(1, 1, 1)),))
        raise KeyboardInterrupt

    assert run_bench(stopped, bench._effort(1, quick=True), {}, Output(json=True)) == 130
    shown = json.loads(capsys.readouterr().out)
    assert [table["title"] for table in shown["tables"]] == ["first"]
    assert "Stopped by Ctrl-C: what was not measured by then is missing." in shown["notes"]


def test_ctrl_c_before_anything_was_measured_says_so(capsys):
    def stopped(effort):
        raise KeyboardInterrupt
        yield

    assert run_bench(stopped, bench._effort(1, quick=True), {}, Output()) == 130
    assert "stopped before anything was measured" in capsys.readouterr().err


def test_a_picture_needs_times(tmp_path):
    report = Report({}, (Table("none", ("what", "number"), (("a", 1),)),))
    with pytest.raises(ValueError, match="picture: expected at least one table with times, got none"):
        write_picture(report, tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []


def test_a_power_law_is_found_again():
    law = power_law([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)])
    assert law.exponent == pytest.approx(1.5)
    assert law.scale == pytest.approx(3)
    assert (law.low, law.high) == pytest.approx((1.5, 1.5))
    # log2 y = 0, 1, 1, 3 at log2 x = 0, 1, 2, 3: slope 4.5 / 5 = 0.9, residuals 0.1, 0.2, -0.7, 0.4, sum of squares
    # 0.7; standard error sqrt(0.7 / 2 / 5) = 0.2646, times t(2) = 4.303: 1.138
    noisy = power_law([1, 2, 4, 8], [1, 2, 2, 8])
    assert noisy.exponent == pytest.approx(0.9)
    assert noisy.high - noisy.exponent == pytest.approx(1.138, abs=1e-3)
    for x, y in (([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [1, 0, 2])):
        with pytest.raises(ValueError, match="points: expected 3 or more pairs"):
            power_law(x, y)


def test_calls_take_other_tokens_each_and_touch_what_they_choose():
    assert windows(3, 8) == [slice(0, 3), slice(3, 6)]
    problem = make_problem(Shape("tiny", 32, 16, 8, 2), 64, torch.float32)
    assert touched_experts(problem, 1) == 2
    assert touched_experts(problem, 64) == 8


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_meet():
    config = recipe("tiny").model
    size = sized(Decoder(config))
    one_expert = 3 * config.dim * config.moe.hidden_dim
    idle = config.num_layers * (config.moe.num_experts - config.moe.router.k) * one_expert
    assert size.num_parameters - size.num_active == idle
