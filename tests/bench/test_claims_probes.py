"""Probes of their own: what is measured after training has ended, and whose results a change of their code touches."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from equipoise.bench.claims import healing_probe, leak_probe, limits_probe
from equipoise.bench.claims import runs as runs_file
from equipoise.bench.claims.all_probes import PROBES, sources_of
from equipoise.bench.claims.healing_probe import STAYS, Course, compare, healing, steps_to_even
from equipoise.bench.claims.leak_probe import WAYS, leak
from equipoise.bench.claims.limits_probe import limits, part_of_grid
from equipoise.bench.claims.runs import RESULT, Job, Runs, part_of, run_config
from equipoise.layer.mode import NORMAL
from equipoise.routing import ExpertChoice, QuantileBalance
from equipoise.train.loop import Trainer
from equipoise.train.report import Silent
from equipoise.train.run import open_data

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = Console(quiet=True)


@pytest.fixture
def trained(config, tmp_path):
    """Trains the small model with other fields of its `MoEConfig`."""
    made = []

    def train(**moe):
        changed = replace(config, model=replace(config.model, moe=replace(config.model.moe, **moe)))
        opened, tokens = open_data(replace(changed, interference_every=0))
        trainer = Trainer(opened, tokens, tmp_path / f"run{len(made)}", Silent())
        trainer.run()
        made.append(trainer)
        return trainer

    yield train
    for trainer in made:
        trainer.close("finished")


def bits(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------ keys, parts, seeds


def test_probes_of_their_own_change_nobodys_key(arm, tmp_path, monkeypatch):
    """A run with one of the first probes is known by the same four things as before there were others."""
    runs = Runs(tmp_path, seeds=(0,))
    job = Job(arm, 0)
    config = json.loads(run_config(job).to_json())
    del config["data"]["cache_dir"], config["name"]
    defined = {"config": config, "probe": "plain", "code": runs.code, "torch": torch.__version__}
    assert runs._key(job) == hashlib.sha256(json.dumps(defined, sort_keys=True).encode()).hexdigest()[:20]
    jobs = {name: Job(replace(arm, probe=name), 0) for name in ("plain", "tuned_frozen", "healing", "limits", "leak")}
    before = {name: runs._key(each) for name, each in jobs.items()}
    assert len(set(before.values())) == len(jobs)
    own = runs_file._code_of_probe
    monkeypatch.setattr(runs_file, "_code_of_probe", lambda name: "changed" if name == "leak" else own(name))
    assert [name for name, each in jobs.items() if runs._key(each) != before[name]] == ["leak"]


def test_what_a_probe_depends_on_is_there():
    package = Path(runs_file.__file__).parents[2]
    for name in PROBES:
        assert all((package / source).is_file() for source in sources_of(name)), name
    assert sources_of("plain") == ()
    assert sources_of("healing") != ()


def test_a_part_is_the_same_run_with_some_of_its_numbers(arm, tmp_path):
    runs = Runs(tmp_path, seeds=(0,))
    folder = runs._folder(Job(arm, 0))
    folder.mkdir(parents=True)
    (folder / RESULT).write_text(json.dumps({"numbers": {"1.a.loss": 3.0, "1.b.loss": 4.0, "1.a.drop": 0.5}}))
    assert runs.result(arm.at("1.a"), 0) == {"loss": 3.0, "drop": 0.5}
    assert runs.result(arm, 0)["1.b.loss"] == 4.0
    assert arm.at("1.a").run == arm
    with pytest.raises(ValueError, match=r"part: expected the beginning of a number's name, got '1\.' of 1\.a\.loss, "):
        part_of(runs.result(arm, 0), "1.")


def test_an_arm_may_have_fewer_seeds_than_the_bench(arm, tmp_path):
    few = replace(arm, label="few", num_seeds=2)
    assert (few.seeds((3, 4, 5)), arm.seeds((3, 4, 5))) == ((3, 4), (3, 4, 5))
    claim = type("Asks", (), {"arms": (arm, few)})()
    jobs = Runs(tmp_path, seeds=(3, 4, 5)).jobs([claim])
    assert [(job.arm.label, job.seed) for job in jobs] == [
        ("small", 3),
        ("few", 3),
        ("small", 4),
        ("few", 4),
        ("small", 5),
    ]


# ------------------------------------------------------------------------------------------------------------ healing


def test_steps_are_counted_to_the_first_of_a_few_even_ones():
    assert STAYS == 5
    assert steps_to_even([0.1] * 9) == 0
    assert steps_to_even([3.0, 0.4, 0.4, 3.0, *[0.4] * 5]) == 4  # two even ones do not make it even
    assert steps_to_even([3.0, *[0.4] * 4]) == 5  # nor four at the end: as many as there are
    assert steps_to_even([0.5] * 9) == 9  # the limit is not below itself


def test_the_cost_is_beyond_the_whole_models():
    whole = Course(torch.full((40,), 2.0).numpy(), torch.zeros(40).numpy())
    loss_S = torch.full((40,), 2.0)
    loss_S[:10] = 3.0
    loss_S[-20:] = 2.5
    found = compare(Course(loss_S.numpy(), torch.linspace(3, 0, 40).numpy()), whole)
    assert found["cost"] == pytest.approx((10 * 1.0 + 20 * 0.5) / 40)
    assert found["late_cost"] == pytest.approx(0.5)
    assert found["first_violation"] == 3.0


def test_remedies_heal_what_was_broken_and_the_trained_model_stays(trained, monkeypatch):
    monkeypatch.setattr(healing_probe, "STEPS", 8)
    monkeypatch.setattr(healing_probe, "EVEN", 0.7)  # of 1, the most that there is with two of four experts
    kept = ("nothing", "switch_0.01", "quantile", "fresh_router")
    monkeypatch.setattr(healing_probe, "REMEDIES", {name: healing_probe.REMEDIES[name] for name in kept})
    trainer = trained()
    before = bits(trainer)
    found = healing(trainer)
    assert same_bits(bits(trainer), before)
    assert all(layer.mode == NORMAL for layer in trainer.model.moe_layers.values())
    for fault in ("spike", "runaway"):
        assert found[f"{fault}.nothing.first_violation"] > 0.7
        assert found[f"{fault}.nothing.steps"] == 8
        assert found[f"{fault}.quantile.steps"] < 4
        assert found[f"{fault}.quantile.last_violation"] < 0.7
    assert found["stretch.nothing.first_violation"] > found["whole.max_violation"]
    assert found["runaway.nothing.first_violation"] == pytest.approx(1.0)
    assert found["runaway.fresh_router.first_violation"] < 0.9  # what ran away is gone with it
    assert found["spike.switch_0.01.cost"] != found["spike.quantile.cost"]


def test_a_model_with_a_balancer_is_refused(trained):
    with pytest.raises(ValueError, match=r"healing: expected a model that differs .* balancer alone, got .*bias_E"):
        healing(trained(balance=(QuantileBalance(),)))


# ------------------------------------------------------------------------------------------------------------- limits


@pytest.fixture
def small_grid(monkeypatch):
    monkeypatch.setattr(limits_probe, "FORWARDS", (16, 128))
    monkeypatch.setattr(limits_probe, "TOKENS", 256)


@pytest.mark.usefixtures("small_grid")
def test_limits_drop_what_has_no_room_and_are_taken_away_again(trained):
    trainer = trained()
    before = trainer.evaluate().loss
    found = limits(trainer)
    assert trainer.evaluate().loss == before
    for tokens, policy in ((16, "position"), (128, "position"), (128, "probability"), (128, "random")):
        halved, full = (part_of_grid(tokens, policy, factor) for factor in (0.5, 2.0))
        assert found[f"{halved}.drop_share"] >= 0.5  # there is room for half
        assert found[f"{halved}.cost"] != 0.0
        assert found[f"{full}.drop_share"] == 0.0  # 4 experts, top-2: room for every token in each
        assert found[f"{full}.cost"] == 0.0
    dropped, moved = (part_of_grid(128, policy, 1.0) for policy in ("position", "next_choice"))
    assert found[f"{moved}.drop_share"] < found[f"{dropped}.drop_share"]
    assert found[f"{moved}.elsewhere_share"] > 0.0 == found[f"{dropped}.elsewhere_share"]
    assert not any(".shared." in name for name in found)


@pytest.mark.usefixtures("small_grid")
def test_a_shared_expert_takes_over_where_there_is_one(trained):
    found = limits(trained(shared_experts=1))
    spilled, dropped = (part_of_grid(128, policy, 0.5) for policy in ("shared", "position"))
    assert found[f"{spilled}.drop_share"] == 0.0
    assert found[f"{spilled}.elsewhere_share"] == found[f"{dropped}.drop_share"]
    assert found[f"{spilled}.cost"] != found[f"{dropped}.cost"]


# --------------------------------------------------------------------------------------------------------------- leak


def test_a_token_that_decides_for_itself_owes_nothing_to_others(trained, monkeypatch):
    monkeypatch.setattr(leak_probe, "SEQUENCES", 4)
    found = leak(trained())
    assert found["leak.changed_share"] == 0.0
    for way in WAYS:
        assert found[f"{way}.loss"] == pytest.approx(found["together.loss"], abs=1e-5)


def test_expert_choice_depends_on_who_else_is_there(trained, monkeypatch):
    monkeypatch.setattr(leak_probe, "SEQUENCES", 4)
    trainer = trained(router=ExpertChoice(k=2, allow_future=True), balance=())
    found = leak(trainer)
    assert found["leak.changed_share"] > 0.1
    assert found["leak.divergence"] > 0.0
    assert len({found[f"{way}.loss"] for way in WAYS}) == len(WAYS)
    assert trainer.model.training


def test_one_by_one_is_the_last_place_of_each_beginning(trained):
    """By hand: place 2 of sequence 1 is what the model says after its first three tokens, with nothing else there."""
    trainer = trained(router=ExpertChoice(k=2, allow_future=True), balance=())
    tokens_BS = trainer.data.val.tokens_N[:64].astype("int64")
    tokens_BS = torch.from_numpy(tokens_BS).view(2, 32)
    model = trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(leak_probe.prefix(model, tokens_BS)[1, 2], model(tokens_BS[1:, :3])[0, 2])
        torch.testing.assert_close(leak_probe.lock_step(model, tokens_BS)[1, 2], model(tokens_BS[:, :3])[1, 2])
