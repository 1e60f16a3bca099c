"""The trainer in a folder: what it writes, what it refuses, what it says when the loss or the disk gives out."""

import json
import resource
import shutil
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from equipoise.disk.checkpoint import CheckpointError, latest_checkpoint, list_checkpoints, load_checkpoint
from equipoise.faults import Collapse, inject
from equipoise.monitor.incidents import repairs
from equipoise.monitor.store import StoreError
from equipoise.routing import QuantileBalance, SwitchLoss, TopK, ZLoss
from equipoise.train.diagnose import DivergenceError
from equipoise.train.loop import Trainer, load_config
from equipoise.train.report import Silent
from equipoise.train.run import open_data
from equipoise.train.sources import DataError

TOKENS = 8 * 32  # per step


class Listener(Silent):
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.fixture
def open_run(make_config, tmp_path):
    """Open trainers on tmp_path/run; they are closed at the end."""
    trainers = []

    def start(config=None, *, resume=False, out=None, reporter=None):
        config, data = open_data(make_config() if config is None else config)
        trainer = Trainer(config, data, out or tmp_path / "run", reporter or Silent(), resume)
        trainers.append(trainer)
        return trainer

    yield start
    for trainer in trainers:
        with suppress(StoreError):  # the test has closed it
            trainer.close("failed")


def finite(path):
    tensors = load_checkpoint(path).tensors
    return all(bool(torch.isfinite(tensor).all()) for group in tensors.values() for tensor in group.values())


# -------------------------------------------------------------------------------------------- what it writes


def test_the_folder_of_a_run(open_run, make_config, history, tmp_path):
    config = make_config(keep_checkpoints=2, checkpoint_every=3)
    trainer = open_run(config)
    assert trainer.run()
    assert load_config(tmp_path / "run") == trainer.config
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["step-000009", "step-000012"]
    recorded = history(tmp_path / "run")
    steps = list(range(1, 13))
    assert [step for step, _ in recorded["scalars"]["loss"]] == steps
    assert [step for step, _ in recorded["scalars"]["val_perplexity"]] == [6]  # `train` adds the last one
    for layer in ("layers.0.mlp", "layers.1.mlp"):
        windows = recorded["routing"][layer]
        assert [window["step"] for window in windows] == [4, 8, 12]
        # neither the validation at step 6 nor the pass for global counts is in them
        assert [window["num_tokens"] for window in windows] == [4 * TOKENS] * 3
        assert [sum(window["counts_E"]) for window in windows] == [4 * TOKENS * 2] * 3
    assert trainer.store.meta() == {"name": "test", "total_steps": 12, "status": "running"}


def test_no_checkpoint_and_no_validation_before_the_end(open_run, make_config, history, tmp_path):
    open_run(make_config(checkpoint_every=0, eval_every=0)).run()
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["step-000012"]
    assert "val_perplexity" not in history(tmp_path / "run")["scalars"]


def test_stop_writes_a_checkpoint_of_this_moment(open_run, tmp_path):
    trainer = open_run()
    assert not trainer.run(stop=lambda: trainer.step_number == 3)
    assert trainer.step_number == 3
    assert load_checkpoint(latest_checkpoint(tmp_path / "run/checkpoints")).step == 3


def test_it_learns(open_run, make_config):
    trainer = open_run(make_config(steps=40, eval_every=0, checkpoint_every=0, optim={"lr": 1e-2}))
    first = trainer.evaluate().loss
    trainer.run()
    assert trainer.evaluate().loss < first - 1.0


# ------------------------------------------------------------------------------------------- diverged runs

WHERE = r"First not finite: {}.*last good checkpoint is .*step-000005\. Lower optim\.lr .*--resume"


def test_a_poisoned_weight_is_named(open_run, history, tmp_path):
    trainer = open_run()
    trainer.run(until=6)
    with torch.no_grad():
        trainer.model.get_parameter("layers.1.mlp.experts.down_proj")[:, 0, 0] = float("nan")
    where = WHERE.format(r"parameter layers\.1\.mlp\.experts\.down_proj \(8 of 8,192 values\)")
    with pytest.raises(DivergenceError, match=rf"^step 7: loss is nan, gradient norm is nan\. {where}"):
        trainer.run()
    trainer.close("failed")
    assert finite(latest_checkpoint(tmp_path / "run/checkpoints"))
    assert open_run(resume=True).run()  # and the run goes on from there
    assert open_run(out=tmp_path / "straight").run()
    assert history(tmp_path / "run") == history(tmp_path / "straight")


def test_an_infinite_gradient_stops_before_the_weights_move(open_run):
    trainer = open_run()
    trainer.run(until=6)
    weight = trainer.model.get_parameter("layers.0.self_attn.q_proj.weight")
    weight.register_hook(lambda grad: torch.full_like(grad, float("inf")))
    before = weight.clone()
    with pytest.raises(
        DivergenceError, match=r"^step 7: loss is 5\.\d+, gradient norm is inf\. " + WHERE.format("the grad")
    ):
        trainer.run()
    assert torch.equal(weight, before)
    assert trainer.step_number == 6


def test_a_learning_rate_far_too_high(open_run, make_config):
    trainer = open_run(make_config(optim={"lr": 1e25, "warmup": 0}, checkpoint_every=0))
    message = (
        r"^step [234]: loss is .*First not finite: (output of \w+|parameter \w+|the gradient).* checkpoint is none"
    )
    with pytest.raises(DivergenceError, match=message):
        trainer.run()


def test_weights_that_are_not_finite_are_never_saved(open_run, make_config, tmp_path):
    """The loss of a step is that of the weights before it: they are looked at once more before a checkpoint."""
    trainer = open_run(make_config(checkpoint_every=1))
    trainer.run(until=3)
    trainer.optimizer.register_step_post_hook(lambda *_: trainer.model.norm.weight.data.fill_(float("nan")))
    with pytest.raises(
        DivergenceError, match=r"^step 4: the weights .*: parameter norm\.weight \(32 of 32 .*step-000003"
    ):
        trainer.run()
    assert latest_checkpoint(tmp_path / "run/checkpoints").name == "step-000003"
    assert finite(latest_checkpoint(tmp_path / "run/checkpoints"))


# ----------------------------------------------------------------------------------- folders, good and damaged


def test_an_existing_run_is_not_overwritten(open_run, tmp_path):
    open_run().run(until=2)
    before = (tmp_path / "run/config.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"out: .*run already holds a run; go on with --resume, or choose another --out"
    ):
        open_run()
    assert (tmp_path / "run/config.json").read_bytes() == before


def test_resume_without_a_run(open_run, tmp_path):
    message = r"out: .*run holds no run to resume \(no config\.json\); leave out --resume, or check the path"
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        open_run(resume=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]"])
def test_damaged_config(damage, open_run, tmp_path):
    open_run().run(until=1)
    (tmp_path / "run/config.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"config\.json: expected a training run's configuration, got something else"):
        load_config(tmp_path / "run")


def truncate(path):
    file = path / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def flip_a_bit(path):
    file = path / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def remove(path):
    (path / "optimizer.safetensors").unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove])
def test_a_damaged_newest_checkpoint_is_an_error_not_a_detour(damage, open_run, step_of, tmp_path):
    """It names the file and the earlier checkpoint; going on from there would throw steps away unasked."""
    trainer = open_run()
    trainer.run()
    trainer.close("finished")
    root = tmp_path / "run/checkpoints"
    damage(root / "step-000012")
    with pytest.raises(CheckpointError, match=r"step-000012 .*optimizer\.safetensors (has|is) .*step-000010"):
        open_run(resume=True)
    assert step_of(tmp_path / "run") == 12  # nothing was forgotten
    shutil.rmtree(root / "step-000012")  # the remedy that the message names
    assert open_run(resume=True).step_number == 10


def test_a_damaged_only_checkpoint_does_not_start_the_run_from_scratch(open_run, make_config, step_of, tmp_path):
    trainer = open_run(make_config(checkpoint_every=0))
    trainer.run()
    trainer.close("finished")
    truncate(tmp_path / "run/checkpoints/step-000012")
    with pytest.raises(CheckpointError, match=r"step-000012 .*truncated.*no other whole checkpoint"):
        open_run(make_config(checkpoint_every=0), resume=True)
    assert step_of(tmp_path / "run") == 12


def test_without_any_checkpoint_a_resumed_run_begins_anew_and_says_so(open_run, history, tmp_path):
    trainer = open_run()
    trainer.run(until=3)
    trainer.close("failed")
    listener = Listener()
    assert open_run(resume=True, reporter=listener).run()
    assert "no checkpoint yet: starting from step 0" in listener.lines[0]
    assert open_run(out=tmp_path / "straight").run()
    assert history(tmp_path / "run") == history(tmp_path / "straight")


def test_a_full_disk_leaves_the_earlier_checkpoint(open_run, history, tmp_path):
    trainer = open_run()
    trainer.run(until=5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (400_000, before[1])
    )  # the optimizer's state is larger, the store smaller
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint of step 10 was not written.*Earlier .* are untouched"):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    trainer.close("failed")
    root = tmp_path / "run/checkpoints"
    assert [path.name for path in root.iterdir()] == ["step-000005"]
    assert load_checkpoint(root / "step-000005").step == 5
    assert open_run(resume=True).run()
    assert open_run(out=tmp_path / "straight").run()
    assert history(tmp_path / "run") == history(tmp_path / "straight")


# ------------------------------------------------------------------------------------------------ little text


def small_corpus(folder, sizes):
    """One document of words per size, in bytes."""
    path = folder / "small.jsonl"
    words = "the router sends each token to its experts " * 200
    path.write_text("\n".join(json.dumps({"text": f"{i} {words[:size]}"}) for i, size in enumerate(sizes)))
    return str(path)


def test_a_corpus_smaller_than_one_batch(open_run, make_config, tmp_path):
    data = {"corpus": small_corpus(tmp_path, [300, 300]), "cache_dir": tmp_path}
    with pytest.raises(DataError, match=r"stream has \d+ tokens; 257 are needed for 8 window\(s\) of 32"):
        open_run(make_config(data=data))
    assert not (tmp_path / "run").exists()


def test_too_little_validation_text_is_an_error_before_the_first_step(open_run, make_config, tmp_path):
    data = {"corpus": small_corpus(tmp_path, [8000, 8000, 10]), "cache_dir": tmp_path, "val_fraction": 0.01}
    with pytest.raises(DataError, match=r"stream has \d+ tokens; 33 are needed for 1 window.*larger val_fraction"):
        open_run(make_config(data=data))
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------- a collapsed router, found and repaired


@pytest.fixture(scope="module")
def trained(make_config, tmp_path_factory):
    """A run stopped at step 100: its routers are balanced and know what they prefer."""
    out = tmp_path_factory.mktemp("trained") / "run"
    balance = (SwitchLoss(coef=0.01), ZLoss(coef=0.001), QuantileBalance(on_demand=True))
    moe = {"router": TopK(k=2), "balance": balance, "capacity": None}
    config, data = open_data(make_config(steps=150, moe=moe, micro_batch_size=None, eval_every=0, checkpoint_every=0))
    trainer = Trainer(config, data, out, Silent())
    trainer.run(until=100)
    trainer.save()
    trainer.close("interrupted")
    return out


@pytest.fixture
def collapsed(trained, open_run, tmp_path):
    """That run going on with one router that has just collapsed, and what it says."""

    def run(recover):
        shutil.copytree(trained, tmp_path / "run")
        listener = Listener()
        trainer = open_run(replace(load_config(trained), recover=recover), resume=True, reporter=listener)
        tokens_BS = trainer.loader.next_batch().tokens_BS.to(trainer.device)
        assert not trainer.watch.alerts
        assert trainer.store.latest_routing()[1].max_violation < 1.0
        with trainer.watch.recorder.paused():
            inject(trainer.model, Collapse("layers.1.mlp", expert=5), lambda: trainer.model(tokens_BS))
        return trainer, listener

    return run


def alerts_of(trainer):
    """Of this layer, since the fault."""
    return [a for a in trainer.store.alerts() if a.step > 100 and a.finding.layer == "layers.1.mlp"]


def repairs_of(trainer):
    """Of this layer, since the fault."""
    return [a for a in repairs(trainer.store.actions()) if a.step > 100 and a.layer == "layers.1.mlp"]


def test_collapse_is_found_within_three_windows_and_repaired(collapsed):
    trainer, listener = collapsed(recover=True)
    trainer.run(until=100 + 3 * 4)
    [fired] = alerts_of(trainer)
    assert (fired.state, fired.finding.rule, fired.key) == ("firing", "collapse", "layers.1.mlp:collapse")
    assert (fired.finding.layer, fired.finding.expert) == ("layers.1.mlp", 5)
    assert trainer.model.moe_layers["layers.1.mlp"].balancer.active
    assert not trainer.model.moe_layers["layers.0.mlp"].balancer.active  # the healthy layer is left alone
    [action] = repairs_of(trainer)
    assert (action.kind, action.layer, action.reason) == ("quantile_bias", "layers.1.mlp", fired.key)
    assert (action.step, action.state) == (fired.step, "applied")
    assert action.detail.keys() >= {"loss_before", "loss_after", "straggler_before", "straggler_after"}

    trainer.run(until=action.step + 4 * 4)
    [action] = repairs_of(trainer)
    assert (action.step, action.state) == (fired.step, "kept")
    violation = {stats.step: stats.max_violation for stats in trainer.store.routing_history("layers.1.mlp")}
    assert violation[action.step] > 2.0
    assert violation[action.step + 8] < 1.0
    assert violation[action.step + 16] < 1.0
    assert [alert.state for alert in alerts_of(trainer)] == ["firing", "resolved"]
    assert not trainer.watch.alerts
    said = "\n".join(listener.lines)
    assert f"step {fired.step}: firing: layers.1.mlp has collapsed: expert 5" in said
    assert f"step {action.step}: repair quantile_bias on layers.1.mlp at step {action.step}, applied" in said
    assert "resolved" in said


def test_without_recover_nothing_is_changed(collapsed):
    trainer, _ = collapsed(recover=False)
    trainer.run(until=100 + 3 * 4)
    assert [alert.state for alert in alerts_of(trainer)] == ["firing"]
    [proposed] = repairs_of(trainer)
    assert (proposed.kind, proposed.state) == ("quantile_bias", "proposed")
    for layer in trainer.model.moe_layers.values():
        assert not layer.balancer.active
        assert not layer.balancer.bias_E.any()
    windows = trainer.store.routing_history("layers.1.mlp")[-3:]
    assert [stats.step for stats in windows] == [104, 108, 112]
    assert all(stats.max_violation > 1.5 for stats in windows)


def test_an_alert_survives_a_resume(collapsed, open_run):
    """It stays one alert: raised once, and resolved once, though the steps in which it was are repeated."""
    trainer, _ = collapsed(recover=True)
    trainer.run(until=109)
    trainer.save()
    trainer.run(until=126)
    assert [alert.state for alert in alerts_of(trainer)] == ["firing", "resolved"]
    trainer.close("failed")
    resumed = open_run(trainer.config, resume=True)
    assert resumed.step_number == 109
    assert [alert.state for alert in alerts_of(resumed)] == ["firing"]  # what came later is forgotten
    assert [alert.key for alert in resumed.watch.alerts] == ["layers.1.mlp:collapse"]
    assert resumed.model.moe_layers["layers.1.mlp"].balancer.active
    resumed.run(until=126)
    assert [alert.state for alert in alerts_of(resumed)] == ["firing", "resolved"]
