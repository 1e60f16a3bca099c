"""The runs behind the claims: found again by what defines them, stopped and gone on with, shared by two processes."""

import fcntl
import io
import json
import re
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from equipoise.bench.claims import probes
from equipoise.bench.claims.arms import of
from equipoise.bench.claims.claim import NotRunError, find
from equipoise.bench.claims.contrast import difference, training_claim
from equipoise.bench.claims.runs import RESULT, Job, Runs, code_version, read_numbers
from equipoise.cli import main
from equipoise.routing import SwitchLoss, TopK

QUIET = Console(quiet=True)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def other(arm):
    """Another coefficient."""
    moe = replace(arm.config.model.moe, balance=(SwitchLoss(coef=1.0),))
    return of(arm, "other", model=replace(arm.config.model, moe=moe))


def runs_in(out, **options):
    return Runs(out, seeds=(0, 1), **options)


def cells(out):
    return sorted((out / "cells").glob(f"*/{RESULT}"))


# ------------------------------------------------------------------------------------------------------- what a run is


def test_a_run_is_known_by_all_that_defines_it(arm, other, tmp_path, monkeypatch):
    runs = runs_in(tmp_path)
    jobs = [Job(arm, 0), Job(arm, 1), Job(other, 0), Job(replace(arm, probe="temperature"), 0)]
    jobs.append(Job(of(arm, "longer", steps=7), 0))
    keys = {runs._key(job) for job in jobs}
    assert len(keys) == len(jobs)
    assert runs._key(Job(replace(arm, label="another name"), 0)) == runs._key(Job(arm, 0))
    moved = replace(arm.config.data, cache_dir=tmp_path)
    assert runs._key(Job(of(arm, "x", data=moved), 0)) == runs._key(Job(arm, 0))
    monkeypatch.setattr(Runs, "code", "of another day")
    assert runs_in(tmp_path)._key(jobs[0]) not in keys


def test_the_code_counts_and_its_comments_do_not(tmp_path):
    def version(text):
        for part in ("ops", "routing", "layer", "models", "train", "bench/claims"):
            (tmp_path / part).mkdir(parents=True, exist_ok=True)
        (tmp_path / "bench/claims/probes.py").write_text("")
        (tmp_path / "ops/a.py").write_text(text)
        return code_version(tmp_path)

    plain = version('"""A."""\ndef f():\n    """B."""\n    return 1\n')
    assert version('"""C."""\n\n\ndef f():  # why\n    """D."""\n    return (1)\n') == plain
    assert version('"""A."""\ndef f():\n    """B."""\n    return 2\n') != plain


def test_the_noise_floors_runs_come_first_and_seeds_stay_together(arm, other, tmp_path):
    claim = training_claim(
        (difference("loss", "l", "more"),),
        {"treated": other, "baseline": arm},
        {"treated": arm, "baseline": arm},
        name="x",
        theme="t",
        hypothesis="h",
        where="w",
        theirs="n",
        method="m",
        control_is="c",
    )
    same = of(arm, "same", optim=replace(arm.config.optim, lr=0.0031))
    runs = runs_in(tmp_path, noise=((arm, same),))
    assert runs.jobs([claim]) == [Job(each, seed) for seed in (0, 1) for each in (arm, same, other)]
    assert runs.jobs([]) == []
    with pytest.raises(NotRunError, match="the run small, seed 0 is not there"):
        runs.floor("loss")
    assert find(claim, runs).verdict == "not run yet"


def test_too_few_seeds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="seeds, trials: expected at least 1 and 2, got 0 and 20"):
        Runs(tmp_path, seeds=())


# --------------------------------------------------------------------------------------------------------- running them


def test_runs_are_run_once_and_their_numbers_found_again(arm, other, tmp_path):
    jobs = [Job(arm, 0), Job(other, 0)]
    assert runs_in(tmp_path).run(jobs, QUIET) is None
    before = [path.stat().st_mtime_ns for path in cells(tmp_path)]
    assert len(before) == 2
    assert not list(tmp_path.rglob("checkpoints"))  # a laboratory must not fill a disk
    runs = runs_in(tmp_path)
    assert runs.run(jobs, QUIET) is None
    assert [path.stat().st_mtime_ns for path in cells(tmp_path)] == before
    numbers = runs.result(arm, 0)
    assert {"loss", "max_violation", "early_violation", "specialisation", "ratio"} <= numbers.keys()
    assert all(np.isfinite(value) for value in numbers.values())
    assert numbers["ratio"] < runs.result(other, 0)["ratio"]  # a hundred times the coefficient


def test_a_damaged_result_is_run_again(arm, tmp_path):
    runs_in(tmp_path).run([Job(arm, 0)], QUIET)
    (path,) = cells(tmp_path)
    whole = read_numbers(path)
    for text in ("", "{", '{"numbers": 3}', '{"numbers": {"loss": "much"}}'):
        path.write_text(text)
        assert read_numbers(path) is None
    runs_in(tmp_path).run([Job(arm, 0)], QUIET)
    assert without_clock(read_numbers(path)) == without_clock(whole)


def without_clock(numbers):
    return {name: value for name, value in numbers.items() if name != "log_tokens_per_s"}


class InterruptAt(io.StringIO):
    """A terminal that sends this process a signal when a job is done."""

    def write(self, text):
        if "small, seed 0" in text:
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_between_runs_keeps_what_is_done(arm, other, tmp_path):
    jobs = [Job(arm, 0), Job(other, 0)]
    assert runs_in(tmp_path).run(jobs, Console(file=InterruptAt(), width=200)) == signal.SIGINT
    assert len(cells(tmp_path)) == 1
    assert runs_in(tmp_path).run(jobs, QUIET) is None
    assert len(cells(tmp_path)) == 2


def test_ctrl_c_in_a_run_goes_on_from_its_checkpoint_to_the_same_bits(arm, tmp_path, monkeypatch):
    runs_in(tmp_path / "whole").run([Job(arm, 0)], QUIET)
    from equipoise.train.loop import Trainer

    steps = []
    step = Trainer.step

    def counted(trainer):
        step(trainer)
        steps.append(trainer.step_number)
        if steps == [1, 2, 3]:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", counted)
    assert runs_in(tmp_path / "stopped").run([Job(arm, 0)], QUIET) == signal.SIGINT
    assert not cells(tmp_path / "stopped")
    assert runs_in(tmp_path / "stopped").run([Job(arm, 0)], QUIET) is None
    assert steps == [1, 2, 3, 4, 5, 6]  # none was trained twice
    whole, stopped = (without_clock(read_numbers(cells(tmp_path / name)[0])) for name in ("whole", "stopped"))
    assert stopped == whole


def test_what_another_process_has_in_hand_is_left_to_it(arm, other, tmp_path):
    """Its folder is locked: the other run is done meanwhile, and this one once the lock is free."""
    runs = runs_in(tmp_path)
    folder = runs._folder(Job(arm, 0))
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        class FreeAtLast(io.StringIO):
            def write(self, text):
                if "other, seed 0" in text:
                    assert not (folder / RESULT).exists()
                    fcntl.flock(lock, fcntl.LOCK_UN)
                return super().write(text)

        assert runs.run([Job(arm, 0), Job(other, 0)], Console(file=FreeAtLast(), width=200)) is None
    assert len(cells(tmp_path)) == 2


def test_a_run_that_diverges_says_which(arm, tmp_path):
    wild = of(arm, "wild", optim=replace(arm.config.optim, lr=1e30, warmup=0))
    with pytest.raises(RuntimeError, match=r"wild, seed 0: step \d+: "):
        runs_in(tmp_path).run([Job(wild, 0)], QUIET)
    assert not cells(tmp_path)


# ---------------------------------------------------------------------------------------------------------- the probes


def probed(arm, probe, tmp_path):
    job = Job(replace(arm, probe=probe), 0)
    runs = runs_in(tmp_path)
    runs.run([job], QUIET)
    return runs.result(job.arm, 0)


def test_temperature_moves_losses_and_its_control_does_not(arm, tmp_path):
    heated = probed(arm, "temperature", tmp_path)
    assert len({heated["loss_low"], heated["loss_one"], heated["loss_high"]}) == 3
    same = probed(arm, "temperature_same", tmp_path)
    assert same["loss_low"] == same["loss_one"] == same["loss_high"]
    assert same["changed"] == 0.0


def test_fallbacks_even_what_was_broken(arm, tmp_path):
    broken = probed(arm, "fallbacks", tmp_path)
    assert broken["violation_broken"] > broken["violation_healthy"] + 0.3  # of 1, with one of four for all tokens
    assert broken["violation_bias"] < 0.5
    assert broken["violation_round_robin"] < 0.01
    whole = probed(arm, "fallbacks_unbroken", tmp_path)
    assert whole["violation_broken"] == whole["violation_healthy"]
    assert whole["loss_broken"] == whole["loss_healthy"]


def test_tuning_with_a_frozen_router_is_another_run(arm, tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "TUNE_STEPS", 8)
    monkeypatch.setattr(probes, "TUNE_DOMAINS", ("odd",))
    monkeypatch.setitem(probes.PROBES, "tuned_frozen", lambda trainer: probes.tuned(trainer, freeze=8))
    frozen, thawed = (probed(arm, f"tuned_{name}", tmp_path) for name in ("frozen", "thawed"))
    assert frozen["tuned_loss"] != thawed["tuned_loss"]


def test_top_1_and_other_shapes_have_the_same_numbers(arm, tmp_path):
    one = replace(arm.config.model.moe, router=TopK(k=1))
    top_1 = of(arm, "top-1", model=replace(arm.config.model, moe=one))
    assert probed(top_1, "plain", tmp_path).keys() == probed(arm, "plain", tmp_path).keys()


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """The command in this process, in a folder of its own: exit code, what it printed, and its errors."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["equipoise", "bench", "claims", *words])
        with pytest.raises(SystemExit) as ended:
            main(sys.argv[1:])
        return ended.value.code, *capsys.readouterr()

    return run


def test_the_command_measures_writes_its_page_and_remembers(command, tmp_path):
    code, _, lines = command("r12-", "8x7b", "--report", "claims.md", "--out", "lab")
    assert code == 0
    assert re.match(r"1 of \d  r12-\S+: contradicted \(", lines)
    page = (tmp_path / "claims.md").read_text()
    assert "`equipoise bench claims r12- 8x7b --report claims.md --out lab`" in page
    assert "2 contradicted" not in page
    assert "3 contradicted" in page
    assert "Not run yet" in page  # the noise floor
    assert (tmp_path / "img" / "claims-memory.png").stat().st_size > 5000
    assert "6.45" in page
    _, printed, _ = command("five-times", "--report", "claims.md", "--out", "lab", "--json")
    (found,) = json.loads(printed)
    assert found["verdict"] == "contradicted"
    assert found["readings"][0]["mean"] == pytest.approx(8.2 / 2.1)
    assert "4 contradicted" in (tmp_path / "claims.md").read_text()  # those of the first call are remembered


def test_the_list_says_what_it_costs(command, tmp_path):
    code, printed, _ = command("--list", "r1-", "r12-")
    assert code == 0
    assert "3 claims, 2 without training" in printed
    assert "20 training runs for 5 seeds" in printed
    listed = json.loads(command("--list", "--json")[1])
    assert len(listed) >= 24
    assert all(each["where"] and each["theirs"] for each in listed)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [(("nonsense",), "expected names or beginnings of"), (("--seeds", "0"), "expected --seeds of at least 1, got 0")],
)
def test_mistakes_end_with_one_line(words, message, command, tmp_path):
    code, _, complaint = command(*words)
    assert code == 2
    assert message in complaint
    assert complaint.count("\n") == 1
    assert not (tmp_path / "runs").exists()
