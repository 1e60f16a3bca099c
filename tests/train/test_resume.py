"""Resume is exact: stopped, killed or interrupted at any moment, a run ends with the bits of an uninterrupted one."""

import json
import os
import random
import signal

import numpy as np
import pytest
import torch

from equipoise.disk.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint
from equipoise.monitor.store import RunStore
from equipoise.routing import TopK
from equipoise.train.loop import Trainer
from equipoise.train.report import Silent
from equipoise.train.run import open_data, train


def bits(out):
    """The last checkpoint: a sha256 of each file of tensors, and the plain state beside them.

    Without the generators of Python and NumPy, which training neither seeds nor draws from.
    """
    path = latest_checkpoint(out / "checkpoints")
    files = json.loads((path / "manifest.json").read_text())["files"]
    state = json.loads((path / "state.json").read_text())
    del state["state"]["rng"]["python"], state["state"]["rng"]["numpy"]
    return {name: entry["sha256"] for name, entry in files.items() if name != "state.json"}, state


# ------------------------------------------------------------------------------------------------- in one process


@pytest.mark.parametrize("stop_at", [5, 8, 11], ids=["inside-a-window", "between-windows", "before-the-last-step"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_new_trainer_goes_on_with_the_same_bits(stop_at, bf16, make_config, history, tmp_path):
    config, data = open_data(make_config(bf16=bf16, checkpoint_every=stop_at))
    straight = Trainer(config, data, tmp_path / "straight", Silent())
    assert straight.run()
    straight.close("finished")

    first = Trainer(config, data, tmp_path / "resumed", Silent())
    first.run(until=stop_at)
    first.close("failed")
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    resumed = Trainer(config, data, tmp_path / "resumed", Silent(), resume=True)
    assert resumed.step_number == stop_at
    assert resumed.run()
    resumed.close("finished")

    assert bits(tmp_path / "resumed") == bits(tmp_path / "straight")
    buffers = dict(straight.model.named_buffers())  # those that are not saved too
    assert buffers.keys() > straight.model.state_dict().keys() & buffers.keys()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in resumed.model.named_buffers())
    assert history(tmp_path / "resumed") == history(tmp_path / "straight")


def test_a_model_with_a_shortcut_goes_on_with_the_same_bits(make_config, history, tmp_path):
    moe = {"router": TopK(k=1), "shared_experts": 1, "shortcut": "pos1"}
    config, data = open_data(make_config(moe=moe))
    for name, stops in (("straight", (12,)), ("resumed", (5, 12))):
        for number, until in enumerate(stops):
            trainer = Trainer(config, data, tmp_path / name, Silent(), resume=number > 0)
            assert trainer.run(until=until)
            trainer.close("finished" if until == 12 else "failed")
    assert trainer.config.model.moe.shortcut == "pos1"
    assert bits(tmp_path / "resumed") == bits(tmp_path / "straight")
    assert history(tmp_path / "resumed") == history(tmp_path / "straight")


def test_what_is_compared_is_all_there(make_config, history, tmp_path):
    """The tests of this file compare manifests and histories: here is what they hold."""
    config, data = open_data(make_config(steps=5))
    trainer = Trainer(config, data, tmp_path, Silent())
    trainer.run()
    trainer.close("finished")
    checkpoint = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))
    assert checkpoint.tensors.keys() == {"model", "optimizer", "recorder"}
    assert checkpoint.state.keys() == {"optimizer", "loader", "watch", "repairs", "rng"}
    assert checkpoint.tensors["model"]["layers.0.mlp.balancer.bias_E"].abs().sum() > 0  # the balancer works
    window = checkpoint.tensors["recorder"]
    assert window["layers.1.mlp.integers"][:8].sum() == 1 * 8 * 32 * 2  # step 5 alone: the window of 1 to 4 is closed
    assert window["layers.1.mlp.integers"][8] > 0  # drops
    recorded = history(tmp_path)
    assert [step for step, _ in recorded["scalars"]["loss"]] == [1, 2, 3, 4, 5]
    assert recorded["scalars"].keys() >= {"grad_norm", "learning_rate"}
    assert [record["step"] for record in recorded["routing"]["layers.0.mlp"]] == [4]


def test_another_seed_gives_other_bits(make_config, tmp_path):
    runs = []
    for seed in (0, 1):
        config, data = open_data(make_config(steps=5, seed=seed))
        trainer = Trainer(config, data, tmp_path / str(seed), Silent())
        trainer.run()
        trainer.close("finished")
        runs.append(bits(tmp_path / str(seed)))
    assert runs[0] != runs[1]


def test_stopping_at_once_after_a_resume_changes_nothing(make_config, tmp_path):
    config, data = open_data(make_config(steps=5))
    trainer = Trainer(config, data, tmp_path, Silent())
    trainer.run(until=3, stop=lambda: trainer.step_number == 2)
    trainer.close("interrupted")
    before = bits(tmp_path)
    resumed = Trainer(config, data, tmp_path, Silent(), resume=True)
    assert not resumed.run(stop=lambda: True)
    resumed.close("interrupted")
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-000002"]
    assert bits(tmp_path) == before


def test_a_checkpoint_of_another_model_or_other_text_is_refused(make_config, tmp_path):
    config, data = open_data(make_config(steps=5))
    trainer = Trainer(config, data, tmp_path, Silent())
    trainer.run()
    trainer.close("finished")
    other = make_config(steps=5, moe={"num_experts": 4})
    with pytest.raises(ValueError, match=r"(?s)checkpoint .*step-000005 does not fit this run.*Resume with the config"):
        Trainer(other.with_vocab(config.model.vocab_size), data, tmp_path, Silent(), resume=True)
    _, other_data = open_data(make_config(steps=5, data={"val_fraction": 0.3}))
    with pytest.raises(ValueError, match=r"does not fit this run: the loader's state is of .*corpus"):
        Trainer(config, other_data, tmp_path, Silent(), resume=True)
    assert Trainer(config, data, tmp_path, Silent(), resume=True).step_number == 5


# ---------------------------------------------------------------------------------------------- killed for real


@pytest.fixture(scope="module")
def long_config(make_config):
    return make_config(steps=30, checkpoint_every=5, eval_every=10, keep_checkpoints=2)


@pytest.fixture(scope="module")
def uninterrupted(long_config, history, tmp_path_factory):
    """(history, bits) of the run of which the tests below kill copies."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    train(long_config, out, Silent())
    torch.set_num_threads(before)
    return history(out), bits(out)


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL  # it was still running


def test_kill_9_at_several_moments(long_config, uninterrupted, history, step_of, child, wait_until, tmp_path):
    """Before the first step; before the first checkpoint; while a later one is being written."""
    out = tmp_path / "run"
    with child(out, long_config) as process:
        wait_until((out / "config.json").exists, process)
        kill(process)
    with child(out) as process:
        wait_until(lambda: step_of(out) >= 2, process)
        kill(process)

    def half_written():
        return list((out / "checkpoints").glob(".tmp-step-*"))

    def caught_in_a_checkpoint():
        """Stopped with a half-written folder on the disk; let go again when it was already renamed."""
        if not (half_written() and list_checkpoints(out / "checkpoints")):
            return False
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        if half_written():
            return True
        os.kill(process.pid, signal.SIGCONT)
        return False

    with child(out) as process:
        wait_until(caught_in_a_checkpoint, process, pause=0.0)
        kill(process)
    assert half_written()

    result = train(None, out, Silent(), resume=True)
    assert result.step == 30
    assert (history(out), bits(out)) == uninterrupted
    assert not half_written()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint(
    number, long_config, uninterrupted, history, step_of, child, wait_until, tmp_path
):
    out = tmp_path / "run"
    with child(out, long_config) as process:
        wait_until(lambda: step_of(out) >= 3, process)
        process.send_signal(number)
        output, _ = process.communicate()
        assert process.returncode == 0, output
    step, told = output.split()
    assert int(told) == number
    checkpoint = latest_checkpoint(out / "checkpoints")
    assert load_checkpoint(checkpoint).step == int(step) == step_of(out)
    with RunStore.open_readonly(out) as store:
        assert store.meta()["status"] == "interrupted"
    result = train(None, out, Silent(), resume=True)
    assert (result.step, result.signal) == (30, None)
    assert (history(out), bits(out)) == uninterrupted
    with RunStore.open_readonly(out) as store:
        assert store.meta()["status"] == "finished"
