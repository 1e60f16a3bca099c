"""A training run that repairs itself: what it remembers, what it does about a fault, and that a resume knows it all."""

import shutil
from dataclasses import replace

import pytest
import torch

from equipoise.disk.checkpoint import list_checkpoints
from equipoise.faults import Collapse, LogitBlowUp, NaNExpert, StaleCounters, inject, inject_counters
from equipoise.layer.mode import NORMAL
from equipoise.monitor.incidents import incidents, repairs
from equipoise.monitor.watch import Watch
from equipoise.recovery.known_good import KnownGood
from equipoise.recovery.policy import OneRung
from equipoise.routing import SwitchLoss, TopK
from equipoise.train.diagnose import DivergenceError
from equipoise.train.loop import Trainer, load_config
from equipoise.train.report import Silent
from equipoise.train.run import open_data

LAYER = "layers.1.mlp"


@pytest.fixture(scope="module")
def trained(make_config, tmp_path_factory):
    """A run stopped at step 120, with a checkpoint that is known to be good."""
    out = tmp_path_factory.mktemp("trained") / "run"
    moe = {"router": TopK(k=2), "balance": (SwitchLoss(coef=0.1),), "capacity": None}
    options = {"batch_size": 16, "micro_batch_size": None, "eval_every": 0, "checkpoint_every": 40, "watch_every": 2}
    config, data = open_data(make_config(steps=200, moe=moe, **options))
    for until, recover in ((118, False), (120, True)):  # what happens in the first steps is left alone
        trainer = Trainer(replace(config, recover=recover), data, out, Silent(), resume=recover)
        trainer.run(until=until)
        if not recover:
            trainer.save()
        trainer.close("interrupted")
    config_file = out / "config.json"
    config_file.write_text(replace(config, recover=True).to_json(), encoding="utf-8")
    return out


@pytest.fixture
def going_on(trained, tmp_path):
    """Trainers that go on from it in a folder of their own."""
    opened = []

    def start(name="run", **changes):
        out = tmp_path / name
        if not out.exists():
            shutil.copytree(trained, out)
        config, data = open_data(replace(load_config(out), **changes))
        opened.append(Trainer(config, data, out, Silent(), resume=True))
        return opened[-1]

    yield start
    for trainer in opened:
        trainer.watch.detach()
        trainer.store.close()


def put_in(trainer, fault):
    batch = trainer.loader.next_batch()
    with trainer.watch.recorder.paused():
        return inject(trainer.model, fault, lambda: trainer.model(batch.tokens_BS.to(trainer.device)))


def story(trainer, after=120):
    return [(a.kind, a.layer, a.state) for a in repairs(trainer.store.actions()) if a.step > after]


# ------------------------------------------------------------------------------------------------- what is remembered


def test_healthy_checkpoints_become_known_good_records(trained):
    registry = KnownGood(trained)
    records = registry.records
    assert records
    assert records[-1].step == 120
    assert records[-1].checkpoint in [path.name for path in list_checkpoints(trained / "checkpoints")]
    assert set(records[-1].baselines) == {"layers.0.mlp", LAYER}
    tensors = registry.load(records[-1])
    assert f"{LAYER}.router.weight" in tensors
    assert f"{LAYER}.dense.down_proj.weight" in tensors  # a stand-in, distilled while the experts were healthy
    assert "dense paths in place of all experts cost" in records[-1].note


def test_remembering_leaves_no_trace_in_the_run(going_on):
    """The same checkpoint again is the same checkpoint: neither a canary nor a stand-in moves the random numbers."""
    trainer = going_on()
    trainer.run(until=122)
    assert trainer.save() == trainer.save()


def test_a_broken_moment_is_not_remembered_and_the_good_checkpoint_is_kept(going_on):
    trainer = going_on(recover=False, checkpoint_every=2, keep_checkpoints=2)
    put_in(trainer, Collapse(LAYER, 5, 40.0))
    trainer.run(until=132)
    names = [path.name for path in list_checkpoints(trainer.out / "checkpoints")]
    assert names == ["step-000120", "step-000130", "step-000132"]
    assert trainer.repairs.known_good.latest().step == 120


# ------------------------------------------------------------------------------------------------- what is done


def test_the_ladder_repairs_a_collapse_and_the_incident_tells_it(going_on):
    trainer = going_on()
    put_in(trainer, Collapse(LAYER, 5, 40.0))
    trainer.run(until=140)
    assert story(trainer) == [("quantile_bias", LAYER, "kept")]
    [incident] = [i for i in incidents(trainer.store.alerts(), trainer.store.actions()) if i.fired > 120]
    assert incident.finding.expert == 5
    assert incident.resolved is not None
    [repair] = incident.actions
    assert repair.detail["straggler_before"] > 3.5
    assert repair.detail["straggler_after"] < 2.0


def test_round_robin_then_reload_goes_back_to_the_checkpoint_and_trains_on(going_on):
    trainer = going_on(policy="round_robin_then_reload")
    good = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    put_in(trainer, Collapse(LAYER, 5, 40.0))
    trainer.run(until=126)
    made = story(trainer)
    assert made[:2] == [("round_robin", LAYER, "undone"), ("full_rollback", LAYER, "applied")]
    assert all(torch.equal(tensor, good[name]) for name, tensor in trainer.model.state_dict().items())  # just loaded
    trainer.run(until=140)
    assert story(trainer)[1] == ("full_rollback", LAYER, "kept")
    assert trainer.model.moe_layers[LAYER].mode == NORMAL
    assert trainer.step_number == 140  # steps, data and history go on


@pytest.mark.parametrize("where", ["expert", "elsewhere"])
def test_a_loss_that_is_no_number_is_survived(going_on, where):
    trainer = going_on()
    if where == "expert":
        put_in(trainer, NaNExpert(LAYER, 3, seed=1))
    else:
        with torch.no_grad():
            trainer.model.norm.weight[0] = torch.nan
    trainer.run(until=126)
    expected = ("reseed", LAYER) if where == "expert" else ("full_rollback", "model")
    assert (*expected, "kept") in story(trainer)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    losses = [value for step, value, _ in trainer.store.scalar_history("loss") if step > 121]
    assert all(value < 10 for value in losses)


def test_without_recover_it_stops_as_ever(going_on):
    trainer = going_on(recover=False)
    put_in(trainer, NaNExpert(LAYER, 3, seed=1))
    with pytest.raises(DivergenceError, match=r"First not finite: parameter layers\.1\.mlp\.experts"):
        trainer.run(until=126)
    assert story(trainer) == []


def test_counters_that_stand_still_are_noticed_and_nothing_is_repaired(going_on):
    trainer = going_on()
    fault = inject_counters(trainer.watch, StaleCounters("stale"))
    trainer.run(until=130)
    assert fault.in_place
    [alert] = [alert for alert in trainer.watch.alerts if alert.finding.rule == "counters"]
    assert alert.finding.layer == "model"
    assert (
        "the monitor's counters are wrong: layers.0.mlp counted 0 tokens, expected 1,024 per flush"
        in alert.finding.message
    )
    assert story(trainer) == []


def test_the_learning_rate_is_cut_and_stays_cut_after_a_resume(going_on):
    trainer = going_on()
    trainer.repairs.recovery.policy = OneRung("lr_cut")
    put_in(trainer, Collapse(LAYER, 5, 40.0))
    trainer.run(until=124)
    trainer.save()
    assert trainer.repairs.rate_scale == 0.5
    rates = {step: value for step, value, _ in trainer.store.scalar_history("learning_rate")}
    trainer.run(until=125)
    [(_, after, _)] = trainer.store.scalar_history("learning_rate", last=1)
    assert after < 0.6 * rates[122]
    trainer.close("failed")
    again = going_on()
    assert again.repairs.rate_scale == 0.5
    assert again.repairs.recovery.on_trial.kind == "lr_cut"


# ------------------------------------------------------------------------------------------------- a resume knows it


@pytest.mark.parametrize("stop_at", [123, 124, 127, 131], ids=["before", "on-trial", "trial-goes-on", "after"])
def test_a_resume_in_the_middle_of_a_repair_has_the_same_bits(going_on, history, stop_at):
    """The fault is in the weights, so it is in the checkpoint; the repair, its trial and its verdict come again."""

    def broken(name):
        trainer = going_on(name)
        put_in(trainer, Collapse(LAYER, 5, 40.0))
        trainer.save()
        return trainer

    straight = broken("straight")
    straight.run(until=136)
    first = broken("resumed")
    first.run(until=stop_at)
    first.save()
    first.close("interrupted")
    torch.manual_seed(99)
    resumed = going_on("resumed")
    assert resumed.step_number == stop_at
    resumed.run(until=136)
    expected = straight.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())
    assert story(resumed) == story(straight) == [("quantile_bias", LAYER, "kept")]


def test_modes_in_force_survive_a_resume(going_on):
    trainer = going_on()
    trainer.repairs.recovery.policy = OneRung("spill")
    put_in(trainer, Collapse(LAYER, 5, 40.0))
    trainer.run(until=130)
    trainer.save()
    mode = trainer.model.moe_layers[LAYER].mode
    assert mode.capacity is not None
    trainer.close("failed")
    again = going_on()
    assert again.model.moe_layers[LAYER].mode == mode
    assert again.model.moe_layers[LAYER].dense is not None  # from the known-good record
    again.run(until=134)


def test_a_blow_up_alone_is_not_mistaken(going_on):
    """In training nothing compares the logits with a baseline: no alert, no repair, and no harm to the run."""
    trainer = going_on()
    put_in(trainer, LogitBlowUp(LAYER, 5.0))
    trainer.run(until=130)
    assert story(trainer) == []


def test_the_newest_record_is_what_the_monitor_compares_with(going_on, monkeypatch):
    """After a checkpoint that is known to be good, and after a resume; as a model that learns."""
    used, use = [], Watch.use_baselines

    def noted(self, baselines, *, learning):
        used.append((baselines, learning))
        use(self, baselines, learning=learning)

    monkeypatch.setattr(Watch, "use_baselines", noted)
    trainer = going_on()
    registry = trainer.repairs.known_good
    assert used == [(registry.latest().baselines, True)]
    trainer.run(until=160)
    assert registry.latest().step == 160
    assert used[1:] == [(registry.latest().baselines, True)]


def test_a_record_that_a_kill_left_out_is_made_at_the_resume(going_on):
    """Killed after the checkpoint was written and before its record: the resumed run has what the other one has."""
    trainer = going_on()
    trainer.run(until=160)
    registry = trainer.repairs.known_good
    assert registry.latest().step == 160
    record = registry.latest()
    trainer.close("failed")
    registry.truncate_after(120)
    again = going_on()
    assert again.step_number == 160
    assert again.repairs.known_good.latest().id == record.id


def test_records_of_a_way_not_taken_are_forgotten(going_on):
    """Somebody goes back to an older checkpoint by moving newer ones away: what is known of them goes too."""
    trainer = going_on()
    trainer.run(until=160)
    trainer.close("failed")
    shutil.rmtree(trainer.out / "checkpoints" / "step-000160")
    again = going_on()
    assert again.step_number == 120
    assert [record.step for record in again.repairs.known_good.records][-1] == 120
