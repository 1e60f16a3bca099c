"""The command line, in real processes: help that teaches, mistakes in one line, Ctrl-C that loses nothing."""

import ast
import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from equipoise.cli import COMMANDS
from equipoise.disk.files import free_folder
from equipoise.monitor.store import RunStore, StoreError

ENV = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def run(*args, **kwargs):
    command = [sys.executable, "-W", "error", "-m", "equipoise", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENV, **kwargs)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A corpus of two domains: modules of the standard library, and help topics."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "small.jsonl"
    sources = [Path(m.__file__).read_text(encoding="utf-8") for m in (json, os, subprocess, signal)]
    rows = [{"text": t, "domain": "python"} for t in sources]
    rows += [{"text": t, "domain": "prose"} for t in list(topics.values())[:40]]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_every_command_has_help_that_explains_it():
    for name in COMMANDS:
        done = run(name, "--help")
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) > 200


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train"], "name a recipe"),
        (["train", "tiny", "--resume", "--out", "nowhere"], "holds no run to resume"),
        (["train", "tiny", "--data", "no/such/file.txt"], "no such file or folder exists"),
        (["train", "tiny", "--steps", "0"], "steps: expected at least 1"),
        (["train", "tiny", "--resume", "--steps", "7"], "leave out the changes"),
        (["train", "--resume", "--freeze-router", "7"], "leave out the changes"),
        (["train", "finetune", "--data", "my.jsonl"], "from: expected the run folder"),
        (["train", "tiny", "--from", "runs/demo"], "need that recipe, got 'tiny'"),
        (["watch", "nowhere"], "run folder"),
        (["bench", "sweep", "--steps", "0"], "steps: expected at least 1"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(args, message, tmp_path):
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_train_then_watch_then_refuse_to_overwrite(text, tmp_path):
    out = tmp_path / "run"
    args = ["train", "tiny", "--data", text, "--steps", 12, "--eval-every", 6, "--checkpoint-every", 6, "--out", out]
    done = run(*args, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["step"] == 12
    assert result["specialisation"] == []  # was not asked for
    assert 1 < result["evaluation"]["perplexity"] < 512
    assert set(result["evaluation"]["by_domain"]) == {"python", "prose"}
    seen = json.loads(run("watch", out, "--json").stdout)
    assert [layer["layer"] for layer in seen["routing"]] == ["layers.0.mlp", "layers.1.mlp"]
    assert sum(seen["routing"][0]["counts_E"]) == seen["routing"][0]["num_tokens"] * 2
    assert "layers.1" in run("watch", out).stdout
    again = run(*args)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr
    fine = ["train", "finetune", "--from", out, "--data", text, "--freeze-router", 100, "--out", tmp_path / "tuned"]
    tuned = run(*fine, "--steps", 4, "--train", "task-experts")
    assert tuned.returncode == 0, tuned.stderr
    assert "layers.1.mlp: trains 1 of 8 experts" in tuned.stdout
    assert "perplexity" in tuned.stdout


def test_two_experts_say_whether_they_specialise(text, tmp_path):
    args = ["train", "tiny_two_experts", "--data", text, "--steps", 12, "--eval-every", 0, "--out"]
    result = json.loads(run(*args, tmp_path / "a", "--json").stdout)
    assert [layer["layer"] for layer in result["specialisation"]] == ["layers.0.mlp", "layers.1.mlp"]
    for layer in result["specialisation"]:
        assert layer["domains"] == ["python", "prose"]
        assert all(sum(shares) == pytest.approx(1) for shares in layer["shares"])
        assert 0 < layer["p_value"] <= 1
    shown = run(*args, tmp_path / "b").stdout
    assert "Mutual information" in shown
    assert "specialis" in shown.splitlines()[-3]


def test_ctrl_c_writes_a_checkpoint_and_resume_finishes(text, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "equipoise", "train", "tiny", "--data", str(text), "--steps", "40"]
    command += ["--checkpoint-every", "0", "--eval-every", "0", "--out", str(out)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    wait_for_step(out, 3, child)
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=120)
    assert child.returncode == 130, stderr
    assert "go on with: equipoise train --resume --out" in stdout.replace("\n", " ")
    done = run("train", "--resume", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 40
    with RunStore.open_readonly(out) as store:
        assert [step for step, _, _ in store.scalar_history("loss")] == list(range(1, 41))
        assert store.meta()["status"] == "finished"


def test_a_sweep_stopped_by_ctrl_c_goes_on_with_the_same_command(text, tmp_path):
    out = tmp_path / "sweep"
    args = ["bench", "sweep", "--data", text, "--coefs", "0", "0.1", "--rates", "0", "--seeds", "0", "--out", out]
    command = [sys.executable, "-m", "equipoise", *map(str, args), "--steps", "60"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    wait_for_step(out / "cells" / "coef-0.1_rate-0_seed-0", 2, child)  # the second of two
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=120)
    assert child.returncode == 130, stderr
    assert f"stopped; 1 of 2 runs are done and kept in {out}; the same command goes on" in stdout
    other = run(*args, "--steps", 61)
    assert other.returncode == 2
    assert "steps 60 there, 61 here" in other.stderr
    done = run(*args, "--steps", 60)
    assert done.returncode == 0, done.stderr
    assert "1/2" not in done.stdout  # was not run again
    assert "2/2 coef 0.1, rate 0, seed 0: loss " in done.stdout
    assert "(one seed)" in done.stdout
    again = json.loads(run(*args, "--steps", 60, "--json").stdout)
    assert [cell["coef"] for cell in again["cells"]] == [0.0, 0.1]
    assert again == json.loads((out / "sweep.json").read_text())


def test_help_of_a_sweep_says_what_it_does_and_how_it_goes_on():
    shown = " ".join(run("bench", "sweep", "--help").stdout.split())
    for words in ("Ctrl-C loses nothing", "--coefs", "--rates", "--seeds", "--scope", "MaxVio", "sweep.png"):
        assert words in shown


def wait_for_step(out, step, child, seconds=120):
    """Until the run's store has `step`; fails when the child ends first or time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()
        try:
            with RunStore.open_readonly(out) as store:
                if any(s >= step for s, _, _ in store.scalar_history("loss", last=1)):
                    return
        except StoreError:
            pass  # not there yet
        time.sleep(0.05)
    raise AssertionError(f"step {step} not reached in {seconds} s")


def test_a_free_folder_never_takes_an_old_run(tmp_path):
    assert free_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert free_folder(tmp_path / "demo") == tmp_path / "demo-3"


def test_the_list_of_commands_says_what_each_says_itself():
    for name, command in COMMANDS.table.items():
        own = " ".join((inspect.getdoc(COMMANDS[name]) or "").split())
        assert own.startswith(command.says), name


def test_a_stand_in_is_never_run():
    with pytest.raises(AssertionError, match="loaded before it is run"):
        COMMANDS.only(["train"])["demo"]()


@pytest.mark.parametrize(
    "words", ["import equipoise", "from equipoise.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"]
)
def test_neither_the_package_nor_its_list_of_commands_loads_anything_heavy(words):
    code = f"import sys\n{words}\nprint(sorted({{'torch', 'numpy', 'rich', 'tokenizers'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=ENV, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_public_name_is_there_when_it_is_asked_for():
    import equipoise

    assert set(equipoise.__all__) == set(equipoise._HOMES)
    for name in equipoise.__all__:
        assert getattr(equipoise, name) is getattr(importlib.import_module(equipoise._HOMES[name]), name)
    assert set(equipoise.__all__) <= set(dir(equipoise))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = equipoise.nonsense


def test_what_type_checkers_see_is_what_is_imported():
    import equipoise

    tree = ast.parse(Path(equipoise.__file__).read_text(encoding="utf-8"))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert seen == equipoise._HOMES
