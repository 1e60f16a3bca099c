"""Where a run takes requests: it obeys, answers, lets drifts go on, and is never brought down by one of them."""

import os
import shutil

import pytest
import torch
from tests.bits import bits
from torch import nn

from equipoise.disk.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from equipoise.faults import (
    BiasRunaway,
    CheckpointDamage,
    Collapse,
    Drift,
    FaultDesk,
    LogitBlowUp,
    NaNExpert,
    RouterCorruption,
    SkewedInput,
    SlowExpert,
    StaleCounters,
    damage,
    from_json,
)
from equipoise.faults.requests import Answer, Inject, Remove, listening, post, wait_for
from equipoise.layer import MoE
from equipoise.monitor.recorder import Recorder
from equipoise.routing import TopK

E = 8
TENSORS = {"model": {"weight": torch.arange(12.0).view(3, 4)}}
X_TD = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    return nn.Sequential(*[MoE(16, 8, E, router=TopK(k=2)) for _ in range(2)])


@pytest.fixture
def desk(tmp_path, model):
    desk = FaultDesk(tmp_path, model, lambda: model(X_TD), Recorder(model))
    yield desk
    desk.close()


def same(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def ask(tmp_path, desk, *requests):
    """What the desk answers to each, after one step."""
    ids = [post(tmp_path, request) for request in requests]
    desk.step()
    answers = [wait_for(tmp_path, id, 0) for id in ids]
    return answers if len(answers) > 1 else answers[0]


def checkpoint(tmp_path, step=5):
    return save_checkpoint(tmp_path / "checkpoints", step, TENSORS, {})


# ------------------------------------------------------------------------------------------------ idle


def test_nothing_posted_nothing_done(tmp_path, desk, model, monkeypatch):
    """One look into one folder; no other call of the system that names a file."""
    before, tree = bits(model), sorted(tmp_path.rglob("*"))
    times = {path: path.stat().st_mtime_ns for path in tree}
    calls = []
    names = ("listdir", "scandir", "mkdir", "makedirs", "open", "rename", "replace", "stat", "unlink", "chmod")
    with monkeypatch.context() as patch:
        for name in names:
            real = getattr(os, name)
            patch.setattr(
                os, name, lambda *args, real=real, name=name, **kw: (calls.append(name), real(*args, **kw))[1]
            )
        for _ in range(3):
            assert desk.step() == []
    assert [name for name in calls if name not in ("stat", "listdir")] == []
    assert calls.count("listdir") == 3
    assert sorted(tmp_path.rglob("*")) == tree
    assert {path: path.stat().st_mtime_ns for path in tree} == times
    assert same(model, before)
    assert desk.in_place == []


def test_a_folder_that_is_gone_is_told_once_and_again_when_it_was_back(tmp_path, desk):
    shutil.rmtree(tmp_path / "requests")
    [said] = desk.step()
    assert said.startswith("faults can't be taken: ")
    assert "this run takes no faults; start it with --accept-faults" in said
    assert desk.step() == []
    (tmp_path / "requests" / "taken").mkdir(parents=True)
    assert desk.step() == []
    shutil.rmtree(tmp_path / "requests")
    assert len(desk.step()) == 1


def test_one_process_per_run_and_none_after_closing(tmp_path, desk, model):
    assert listening(tmp_path)
    with pytest.raises(ValueError, match=r"expected to be the only process that takes this run's faults"):
        FaultDesk(tmp_path, model, lambda: None)
    desk.close()
    desk.close()
    assert not listening(tmp_path)
    id = post(tmp_path, Inject(LogitBlowUp("0")))
    assert desk.step() == []  # closed: whoever opens the run next takes it
    assert wait_for(tmp_path, id, 0) is None
    second = FaultDesk(tmp_path, model, lambda: None)
    assert second.step() == ["fault put in: logit-blow-up (layer '0', intensity 30.0)"]
    second.close()


# ------------------------------------------------------------------------------------------------ in and out


def test_faults_go_in_and_out_and_are_answered(tmp_path, desk, model):
    before = bits(model)
    faults = [Collapse("0", 3), LogitBlowUp("1"), NaNExpert("1", 2), SlowExpert("0", 3, 0.001), RouterCorruption("0")]
    answers = ask(tmp_path, desk, *map(Inject, faults))
    assert [each.ok for each in answers] == [True] * 5
    assert answers[0].text == "fault put in: collapse (layer '0', expert 3, intensity 10.0)"
    assert desk.in_place == faults
    one = ask(tmp_path, desk, Remove("1"))
    assert one == Answer(
        True, "taken out: nan-expert (layer '1', expert 2, seed 0); logit-blow-up (layer '1', intensity 30.0)"
    )
    assert desk.in_place == [faults[0], faults[3], faults[4]]
    assert same(model[1], {name[2:]: tensor for name, tensor in before.items() if name.startswith("1.")})
    assert ask(tmp_path, desk, Remove()).ok
    assert same(model, before)
    assert desk.in_place == []


def test_a_request_and_its_removal_in_one_step(tmp_path, desk, model):
    before = bits(model)
    put, out = ask(tmp_path, desk, Inject(Collapse("0", 3)), Remove())
    assert (put.ok, out.ok) == (True, True)
    assert same(model, before)


def test_a_drift_goes_on_by_one_part_per_step(tmp_path, desk, model):
    before, weight = bits(model), model[0].router.weight
    assert ask(tmp_path, desk, Inject(Drift("0", 3, 12.0, steps=3))).ok
    moved = [(weight - before["0.router.weight"]).norm().item()]  # one part: from the step on that put it in
    for _ in range(4):
        assert desk.step() == []
        moved.append((weight - before["0.router.weight"]).norm().item())
    assert [m / moved[0] for m in moved] == pytest.approx([1, 2, 3, 3, 3], rel=1e-4)
    assert ask(tmp_path, desk, Remove()).ok
    assert same(model, before)
    desk.step()
    assert same(model, before)


def test_a_drift_that_cannot_go_on_is_told_and_let_go(tmp_path, desk, model):
    """As when a repair has replaced the layer: the loop goes on, the others too."""
    ask(tmp_path, desk, Inject(Drift("0", 3, steps=9)), Inject(Drift("1", 3, steps=9)))
    model[0].router.weight = None
    [said] = desk.step()
    assert said.startswith("drift (layer '0', expert 3, intensity 10.0, steps 9) stands still: ")
    assert desk.in_place == [Drift("1", 3, steps=9)]
    assert desk.step() == []


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Collapse("7", 1), "Collapse.layer: expected one of 0, 1, got '7'"),
        (Collapse("0", 8), "Collapse.expert: expected 0 to 7, got 8"),
        (BiasRunaway("0", 1), "BiasRunaway.layer: expected a layer with a selection bias, 0 has none"),
        (LogitBlowUp("0", 1e300), "LogitBlowUp.intensity: expected a number that leaves 0 finite, got 1e+300"),
        (SkewedInput(1), "skewed-input: this run does not let its batches be changed"),
        (CheckpointDamage(), "expected a run with checkpoints, found none in"),
        (Collapse("x" * 60_000, 1), "Collapse.layer: expected one of 0, 1, got 'xxx"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_cannot_be_done_is_refused_with_the_reason(fault, told, tmp_path, desk, model):
    before = bits(model)
    said = ask(tmp_path, desk, Inject(fault))
    assert not said.ok
    assert said.text.startswith("refused: ")
    assert told in said.text
    assert len(said.text) < 600
    assert same(model, before)
    assert desk.in_place == []


def test_an_error_in_the_run_is_told_to_the_sender(tmp_path, model):
    def run():
        raise RuntimeError("out of memory")

    desk = FaultDesk(tmp_path, model, run)
    assert ask(tmp_path, desk, Inject(Collapse("0", 1))) == Answer(False, "refused: RuntimeError: out of memory")
    desk.close()


def test_nothing_to_take_out(tmp_path, desk):
    ask(tmp_path, desk, Inject(LogitBlowUp("0")))
    assert ask(tmp_path, desk, Remove("1")) == Answer(False, "refused: expected a fault in place in '1', there is none")
    assert ask(tmp_path, desk, Remove()).ok
    assert ask(tmp_path, desk, Remove()) == Answer(False, "refused: expected a fault in place, there is none")


def test_a_sender_that_cannot_be_told(tmp_path, desk, model):
    before = bits(model)
    id = post(tmp_path, Inject(LogitBlowUp("0")))
    (tmp_path / "requests" / "answers" / f"{id}.json").mkdir()
    said = desk.step()
    assert said[0].startswith("fault put in: logit-blow-up")
    assert said[1].startswith("the sender could not be told: could not write ")
    assert not same(model, before)
    assert desk.in_place == [LogitBlowUp("0")]


# ------------------------------------------------------------------------------------------------ other kinds


def test_counters(tmp_path, model):
    recorder = Recorder(model)
    desk = FaultDesk(tmp_path, model, lambda: None, recorder)

    def count():
        model(X_TD)
        return recorder.flush(1)[0].num_tokens

    assert ask(tmp_path, desk, Inject(StaleCounters("stale"))).ok
    assert count() == 0
    assert ask(tmp_path, desk, Inject(StaleCounters("stale"))).ok  # a second one: both have to go
    assert ask(tmp_path, desk, Remove()).ok
    assert count() == 64
    assert ask(tmp_path, desk, Inject(StaleCounters("reset"))).ok
    model(X_TD)
    desk.step()  # forgets again
    assert recorder.flush(1)[0].num_tokens == 0
    desk.close()
    blind = FaultDesk(tmp_path, model, lambda: None)
    assert ask(tmp_path, blind, Inject(StaleCounters())).text == (
        "refused: stale-counters: this run has no recorder that could stop counting"
    )
    blind.close()


def test_batches_are_changed_while_the_fault_is_in_place(tmp_path, desk):
    domains_B = torch.tensor([0, 0, 0, 1])
    assert desk.rows(domains_B) is None
    assert ask(tmp_path, desk, Inject(SkewedInput(1, intensity=1.0))).ok
    assert desk.rows(domains_B).tolist() == [3, 3, 3, 3]
    assert desk.rows(domains_B[:3]) is None  # nothing of that domain to copy
    assert ask(tmp_path, desk, Remove()).ok
    assert desk.rows(domains_B) is None


@pytest.mark.parametrize("domain", [2**62, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_no_domain_stops_the_loop(domain, dtype, tmp_path, desk):
    domains_B = torch.tensor([0, 1], dtype=dtype)
    desk.rows(domains_B)
    assert ask(tmp_path, desk, Inject(from_json({"fault": "skewed-input", "domain": domain}))).ok
    assert desk.rows(domains_B) is None


def test_checkpoints_are_damaged_and_put_back_also_by_the_next_process(tmp_path, desk, model):
    path = checkpoint(tmp_path)
    assert ask(tmp_path, desk, Inject(CheckpointDamage("flip"))).ok
    with pytest.raises(CheckpointError, match=r"can't be loaded"):
        load_checkpoint(path)
    assert not ask(tmp_path, desk, Inject(CheckpointDamage("flip"))).ok  # twice would lose the original
    desk.close()
    second = FaultDesk(tmp_path, model, lambda: None)
    assert second.in_place == []
    assert ask(tmp_path, second, Remove()) == Answer(True, "taken out: damage to step-000005")
    second.close()
    assert torch.equal(load_checkpoint(path).tensors["model"]["weight"], TENSORS["model"]["weight"])


def test_damage_that_cannot_be_put_back_keeps_no_other_fault_in(tmp_path, desk, model):
    """The checkpoint was pruned since: said so, and the rest is taken out."""
    before = bits(model)
    other, pruned = checkpoint(tmp_path, 4), checkpoint(tmp_path, 5)
    damage(other, CheckpointDamage("missing"))  # by someone else
    answers = ask(tmp_path, desk, Inject(Collapse("0", 3)), Inject(CheckpointDamage("flip")), Inject(LogitBlowUp("1")))
    assert [each.ok for each in answers] == [True] * 3
    shutil.rmtree(pruned)
    said = ask(tmp_path, desk, Remove())
    assert not said.ok
    assert said.text.startswith("taken out: logit-blow-up (layer '1', intensity 30.0); collapse (layer '0', ")
    assert "checkpoint-damage (kind 'flip', seed 0) stays: step-000005: expected the checkpoint as it was" in said.text
    assert said.text.count("it was moved, pruned or saved again") == 1
    assert same(model, before)
    assert desk.in_place == [CheckpointDamage("flip")]
    load_checkpoint(other)  # put back too
    shutil.rmtree(tmp_path / "checkpoints" / ".damaged-step-000005")  # what the message says
    assert ask(tmp_path, desk, Remove()).ok
    assert desk.in_place == []


@pytest.mark.parametrize("name", ["step-000009", "step-" + "1" * 18])
def test_a_checkpoint_that_is_not_there(name, tmp_path, desk):
    checkpoint(tmp_path)
    said = ask(tmp_path, desk, Inject(CheckpointDamage("flip", checkpoint=name)))
    assert said.text.startswith("refused: checkpoint: expected one of step-000005 in ")
    assert said.text.endswith(f"got '{name}'")


def test_a_checkpoint_that_is_a_link_is_left_alone(tmp_path, desk):
    elsewhere = save_checkpoint(tmp_path / "elsewhere", 7, TENSORS, {})
    checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "step-000007").symlink_to(elsewhere)
    said = ask(tmp_path, desk, Inject(CheckpointDamage("flip", checkpoint="step-000007")))
    assert not said.ok
    assert said.text.startswith("refused: checkpoint: expected one of ")
    load_checkpoint(elsewhere)
