"""`equipoise plan` as a command: names and files in, tables, JSON and a picture out, and what it refuses."""

import json
import subprocess
import sys
from functools import partial

import pytest
from tests.commands.running import run_command

from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.plan.links import Cost, Links

GIB = 2**30


@pytest.fixture
def run(capsys):
    return partial(run_command, capsys, "plan")


@pytest.fixture
def asked(run):
    def command(*words):
        code, said = run(*words, "--json")
        assert code in (0, 1), said.err
        return json.loads(said.out)

    return command


@pytest.fixture
def ours(tmp_path):
    config = DecoderConfig(
        vocab_size=64,
        dim=32,
        num_layers=2,
        num_heads=4,
        hidden_dim=48,
        max_seq_len=16,
        moe=MoEConfig(num_experts=4, hidden_dim=8),
    )
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": json.loads(config.to_json())}))
    return folder


def test_it_does_not_fit_and_says_what_would(run):
    code, said = run("deepseek-v3", "--ranks", 16, "--gpu-memory", 80, "--precision", "bf16", "--context", "32k")
    assert code == 1
    for words in ("671,026,419,200", "37,552,297,472", "too much", "twice the ranks: 32", "fits", "published: 671 B"):
        assert words in said.out


def test_it_fits(run, asked):
    assert run("mixtral-8x7b", "--ranks", 2, "--gpu-memory", 80)[0] == 0
    found = asked("mixtral-8x7b", "--ranks", 2, "--gpu-memory", 80)
    assert found["fits"] is True
    assert found["limit"] == 80 * GIB
    assert found["setup"]["mesh"] == {"expert": 2, "data": 1, "shard": "none"}
    assert found["parameters"]["total"] == 46_702_792_704


def test_names_alone_are_listed(run, asked):
    code, said = run()
    assert code == 0
    assert "qwen3-235b-a22b" in said.out
    assert len(asked()) == 18


def test_a_run_is_planned_as_it_would_train(asked, ours):
    found = asked(ours / "config.json", "--train", "--precision", "fp32", "--batch", 8, "--context", 16)
    assert found["work"] == "training"
    assert found["setup"]["context"] == 16
    assert found["memory"]["parts"]["optimizer"] == 8 * found["parameters"]["total"]
    assert asked(ours, "--train", "--precision", "fp32", "--batch", 8, "--context", 16) == found


@pytest.mark.parametrize(
    ("words", "mesh"),
    [
        (("--ranks", 16), (8, 2)),  # 8 experts
        (("--ranks", 6), (2, 3)),
        (("--gpus", 6), (2, 3)),  # the same word to others
        (("--ranks", 16, "--expert", 4), (4, 4)),
        (("--ranks", 16, "--data", 8), (2, 8)),
        (("--data", 2, "--expert", 8), (8, 2)),
        ((), (1, 1)),
    ],
)
def test_ranks_are_divided(asked, words, mesh):
    found = asked("mixtral-8x7b", *words)["setup"]["mesh"]
    assert (found["expert"], found["data"]) == mesh


def test_options_reach_the_plan(asked):
    words = (
        "--train",
        "--optimizer",
        "adamw-8bit",
        "--activations",
        "naive",
        "--micro-batches",
        2,
        "--imbalance",
        0.25,
    )
    setup = asked("mixtral-8x7b", *words, "--shard", "all", "--ranks", 8)["setup"]
    assert setup["work"] == {"optimizer": "adamw-8bit", "activations": "naive", "micro_batches": 2}
    assert setup["imbalance"] == 0.25
    assert setup["mesh"]["shard"] == "all"
    words = ("--expert-precision", "int4", "--cache-precision", "fp8", "--step-tokens", "1k", "--payload", "fp8")
    found = asked("mixtral-8x7b", *words, "--bandwidth", 100, "--latency", 5, "--tflops", 200)
    assert found["setup"]["experts"] == "int4"
    assert found["setup"]["work"] == {"cache": "fp8", "step_tokens": 1024}
    assert found["machine"]["dispatch"] == 1.0
    assert found["machine"]["link"] == pytest.approx({"start_s": 5e-6, "rate": 1e11, "error": 0.0})
    assert found["machine"]["flops"] == 2e14


def test_measured_links(asked, tmp_path):
    line = Cost(3e-4, 1e8)
    names = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")
    costs = dict.fromkeys(names, line)
    found = Links(
        ranks=4, backend="gloo", device="cpu", **costs, barrier_s=1e-4, expert=Cost(0.0, 1e13), dim=64, hidden_dim=64
    )
    path = tmp_path / "links.json"
    path.write_text(json.dumps(found.fields()))
    machine = asked("mixtral-8x7b", "--ranks", 8, "--links", path)["machine"]
    assert machine["link"]["rate"] == 1e8
    assert machine["link"]["start_s"] == pytest.approx(7e-4)  # 1e-4 for each of the others
    assert machine["flops"] == 1e13


def test_the_picture_is_written_whole(run, tmp_path):
    path = tmp_path / "there" / "plan.png"
    code, said = run("mixtral-8x7b", "--gpu-memory", 80, "--picture", path)
    assert code == 1
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [each.name for each in path.parent.iterdir()] == ["plan.png"]
    assert "plan.png" in said.out


def test_a_target_is_answered(asked):
    found = asked("mixtral-8x7b", "--target-ms", 50)
    assert [each["question"] for each in found["advice"]][-1] == "is it fast enough?"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("mixtral",), "mixtral: expected a known model or the path of a config.json"),
        (("nowhere/config.json",), "nowhere/config.json: expected a known model"),
        (("bad.json",), "bad.json: expected JSON"),
        (
            ("mixtral-8x7b", "--context", "32q"),
            "--context: expected a number of tokens such as 4096, 32k or 1m, got '32q'",
        ),
        (("mixtral-8x7b", "--context", "0"), "--context: expected a number of tokens"),
        (("mixtral-8x7b", "--context", "1.0001k"), "--context: expected a number of tokens"),
        (("mixtral-8x7b", "--ranks", 0), "--ranks: expected at least 1, got 0"),
        (("mixtral-8x7b", "--ranks", 8, "--expert", 3), "--ranks: expected expert x data = 3 x 2 = 6, got 8"),
        (("mixtral-8x7b", "--expert", 3), "expert: expected a divisor of the 8 experts"),
        (("mixtral-8x7b", "--gpu-memory", 0), "--gpu-memory: expected a number above 0, got 0.0"),
        (("mixtral-8x7b", "--gpu-memory", "nan"), "--gpu-memory: expected a number above 0, got nan"),
        (("mixtral-8x7b", "--target-ms", -1), "--target-ms: expected a number above 0, got -1.0"),
        (("mixtral-8x7b", "--batch", 0), "batch: expected at least 1, got 0"),
        (("mixtral-8x7b", "--train", "--precision", "int4"), "precision: expected fp32 or bf16 in training, got int4"),
        (("mixtral-8x7b", "--bandwidth", 0), "Cost: expected start_s of at least 0 seconds and a rate above 0"),
        (("mixtral-8x7b", "--links", "missing.json"), "missing.json: there is no such file"),
        (("mixtral-8x7b", "--links", "bad.json"), "bad.json: expected JSON, but it cannot be read"),
    ],
)
def test_mistakes_are_named(run, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    code, said = run(*words)
    assert code == 2
    assert says in " ".join(said.err.replace("│", " ").split())


def test_the_three_numbers_that_scripts_ask_for(asked):
    """At the top, in parameters and bytes: 46.7 B and 12.9 B are what Mixtral's authors state."""
    found = asked("mixtral-8x7b", "--precision", "bf16")
    assert round(found["total_params"] / 1e9, 1) == 46.7
    assert round(found["active_params"] / 1e9, 1) == 12.9
    assert found["memory_bytes"] == found["memory"]["total"] > 2 * found["total_params"]


def test_planning_imports_no_torch():
    code = """if True:
        import sys, types
        package = types.ModuleType("equipoise")  # as if its __init__, which offers layers, were not there
        import importlib.util
        package.__path__ = list(importlib.util.find_spec("equipoise").submodule_search_locations)
        sys.modules["equipoise"] = package
        from equipoise.plan.fit.plan import make_plan
        from equipoise.plan.fit import model_file, report, setup
        report.tables(make_plan(model_file.find_model("deepseek-v3"), setup.Setup()))
        print("torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr
