"""Routers of attention experts: broken, noticed, and repaired; and which repairs they refuse, and why."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from tests.recovery.conftest import Bench, S

import equipoise as eq
from equipoise.faults import BiasRunaway, Collapse, DeadExpert, LogitBlowUp, NaNExpert, RouterCorruption, inject
from equipoise.faults.slow import SlowExpert, SlowRank
from equipoise.layer import Capacity, reduce_and_update
from equipoise.layer.choice import Choice
from equipoise.layer.mode import NORMAL, Mode
from equipoise.layer.tokens import tokens_of
from equipoise.models.attention_experts.configs import MixtureOfAttention, MixtureOfHeads, SwitchHead
from equipoise.models.attention_experts.head_gates import HeadGates
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.recovery.actions import Patient, balancing_bias
from equipoise.recovery.catalogue import REPAIRS
from equipoise.recovery.policy import OneRung
from equipoise.routing import BiasBalance, SwitchLoss, TopK
from equipoise.train.repair import broken
from equipoise.types import Action, Finding

LOSS, STRONG = (SwitchLoss(coef=1.0),), (SwitchLoss(coef=4.0),)
PLAIN = DecoderConfig(vocab_size=256, dim=32, num_layers=2, num_heads=4, hidden_dim=64, max_seq_len=S)
MODELS = {
    "moa": replace(
        PLAIN,
        num_heads=2,
        num_kv_heads=1,
        attention_moe=MixtureOfAttention(num_experts=8, router=TopK(k=2, renormalize="detached"), balance=LOSS),
    ),
    "switch_head": replace(PLAIN, num_heads=2, attention_moe=SwitchHead(num_experts=4, k=1, balance=STRONG)),
    "moh": replace(PLAIN, num_heads=8, attention_moe=MixtureOfHeads(shared_heads=0, router=TopK(k=2), balance=LOSS)),
}
FAULTS = {
    "moa": Collapse("layers.0.self_attn.heads", 3, 40.0),
    "switch_head": Collapse("layers.1.self_attn.values", 3, 40.0, also=(5,)),  # one of each head
    "moh": Collapse("layers.0.self_attn.heads", 3, 40.0),
}
LAYERS = {kind: fault.layer for kind, fault in FAULTS.items()}
EACH = pytest.mark.parametrize("kind", MODELS)
CRITICAL = Finding("collapse", "", None, "critical", 1.0, 0.0, "", "")


@pytest.fixture(scope="module")
def trained():
    """120 steps of each: enough to know more than a guess, and to be balanced."""
    models = {}
    for kind, config in MODELS.items():
        torch.manual_seed(0)
        bench = Bench(Decoder(config))
        bench.train(torch.optim.AdamW(bench.model.parameters(), lr=3e-3), 120)
        models[kind] = bench.model
    return models


class Story:
    """A trained model of that kind, served under watch, with a record of health."""

    def __init__(self, model, layer, folder, policy=None, healthy=3):
        self.bench = Bench(copy.deepcopy(model).eval())
        self.model, self.layer = self.bench.model, self.bench.model.get_submodule(layer)
        self.eye = eq.watch(self.model, every=1)
        self.keeper = eq.recover(
            self.model, self.eye, self.bench.held_out_loss, run_folder=folder, policy=policy, act=True
        )
        assert self.serve(range(1, 1 + healthy)) == [], "a healthy model has alerts"
        self.loss = self.keeper.remember(step=3).loss

    def serve(self, steps):
        """What changed: "collapse firing", or "router_rollback kept"."""
        changes = []
        for step in steps:
            self.bench.serve(step)
            for change in self.keeper.step(step):
                name, rule = (change.kind, "") if isinstance(change, Action) else ("", change.finding.rule)
                changes.append(f"{name or rule} {change.state}")
        return changes

    def break_it(self, fault):
        with self.eye.recorder.paused():
            return inject(self.model, fault, self.bench.held_out_loss)

    def violation(self):
        name = next(name for name, module in self.model.named_modules() if module is self.layer)
        return next(each for each in self.eye.stats() if each.layer == name).max_violation


@EACH
def test_a_collapsed_router_goes_back_to_the_record_and_so_does_the_loss(kind, trained, tmp_path):
    story = Story(trained[kind], LAYERS[kind], tmp_path, OneRung("router_rollback"))
    weight, healthy = story.layer.router.weight.detach().clone(), story.violation()
    story.break_it(FAULTS[kind])
    assert story.bench.held_out_loss() > story.loss + 0.003, "the fault does no harm"
    told = story.serve(range(4, 16))
    assert told == ["collapse firing", "router_rollback applied", "collapse resolved", "router_rollback kept"]
    assert not story.eye.alerts
    assert torch.equal(story.layer.router.weight, weight)
    assert story.violation() <= healthy + 0.3
    assert story.bench.held_out_loss() == story.loss
    story.eye.detach()


@EACH
def test_a_quantile_bias_balances_a_router_that_leans_to_one_expert(kind, trained, tmp_path):
    """In the second layer: what routes in the first sees a token alone, and no bias parts two that are the same."""
    fault = replace(FAULTS[kind], layer=LAYERS[kind].replace(".0.", ".1."), intensity=8.0)
    story = Story(trained[kind], fault.layer, tmp_path, OneRung("quantile_bias"), healthy=0)  # by recent traffic
    story.break_it(fault)
    broken_loss = story.bench.held_out_loss()
    told = story.serve(range(4, 16))
    assert told == ["collapse firing", "quantile_bias applied", "collapse resolved", "quantile_bias kept"]
    assert not story.eye.alerts
    assert story.violation() < 0.5
    assert len(story.layer.mode.bias) == story.layer.num_experts
    assert story.bench.held_out_loss() < broken_loss + 0.05  # the tolerance of the repair
    story.eye.detach()


@EACH
def test_the_ladder_passes_over_what_attention_experts_have_not(kind, trained, tmp_path):
    story = Story(trained[kind], LAYERS[kind], tmp_path)
    with torch.no_grad():  # scores of one value: no bias evens them out
        story.layer.router.weight.fill_(0.0)
    told = story.serve(range(4, 30))
    assert told[0] == "collapse firing"
    assert told.index("next_choice failed") < told.index("spill failed") < told.index("router_rollback applied")
    assert "router_rollback kept" in told
    assert story.bench.held_out_loss() == story.loss
    story.eye.detach()


@pytest.mark.parametrize("repair", ["next_choice", "spill", "dense", "shut_expert", "reseed", "round_robin"])
def test_repairs_that_make_no_sense_say_why_and_change_nothing(repair, trained):
    model, layer = trained["switch_head"], LAYERS["switch_head"]
    patient = Patient(model, model.routed_layers, training=object())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = {
        "next_choice": "Mode.capacity: expected none on attention experts, got Capacity(",
        "spill": "Mode.capacity: expected none on attention experts, got Capacity(",
        "dense": "Mode.dense_share: expected none on attention experts, got 1.0. They have no capacity and nothing",
        "shut_expert": "Mode.shut_experts: expected none on attention experts, got (2,)",
        "reseed": f"reseed: expected an MoE layer, {layer} chooses attention experts",
        "round_robin": "Mode.round_robin: expected one choice among all experts, got 2 heads",
    }[repair]
    with pytest.raises(ValueError, match=re.escape(message)):
        REPAIRS[repair].apply(patient, replace(CRITICAL, layer=layer, expert=2))
    assert model.get_submodule(layer).mode == NORMAL
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------- modes


def choice(router=TopK(k=2), **options) -> Choice:  # noqa: B008 - frozen
    torch.manual_seed(0)
    layer = Choice(router, 8, 6, **options)
    layer.init_weights(0.5)
    return layer


def decide(layer, x):
    view = tokens_of(x, None, None)
    return layer.route(view), view


def test_modes_of_a_choice_and_the_way_back():
    layer, x = choice(balance=(BiasBalance(),)), torch.randn(40, 8)
    plain = decide(layer, x)[0]
    bias = torch.tensor([9.0, 0, 0, 0, 0, 9.0])
    layer.set_mode(Mode(bias=tuple(bias.tolist())))
    assert set(decide(layer, x)[0].expert_ids_N.tolist()) == {0, 5}
    layer.balancer.bias_E.copy_(-bias)  # both together come to nothing
    assert torch.equal(decide(layer, x)[0].expert_ids_N, plain.expert_ids_N)
    layer.balancer.bias_E.zero_()
    layer.set_mode(Mode(round_robin=True))
    assert decide(layer, x)[0].expert_ids_N.bincount().tolist() == [14, 14, 13, 13, 13, 13]  # 80 in turn
    layer.set_mode(Mode(temperature=4.0))
    cooled = decide(layer, x)[0]
    assert torch.equal(cooled.expert_ids_N, plain.expert_ids_N)
    assert cooled.weights_N.std() < plain.weights_N.std()
    layer.set_mode(NORMAL)
    back = decide(layer, x)[0]
    assert torch.equal(back.expert_ids_N, plain.expert_ids_N)
    assert torch.equal(back.weights_N, plain.weights_N)


def test_a_boost_multiplies_losses_and_steps_of_the_bias():
    gradients, steps = [], []
    for boost in (1.0, 10.0):
        layer, x = choice(balance=(*LOSS, BiasBalance(rate=0.01))).train(), torch.randn(40, 8)
        layer.set_mode(Mode(boost=boost))
        decision, view = decide(layer, x)
        y = layer.finish(torch.zeros(40, 8), decision, decision.expert_ids_N.bincount(minlength=6), view, None)
        (y.sum() * 0).backward()
        reduce_and_update([layer])
        gradients.append(layer.router.weight.grad)
        steps.append(layer.balancer.bias_E.abs().max())
    torch.testing.assert_close(gradients[1], 10 * gradients[0])
    torch.testing.assert_close(steps[1], 10 * steps[0])


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (Mode(capacity=Capacity(1.25)), "Mode.capacity: expected none on attention experts"),
        (Mode(dense_share=0.5), "Mode.dense_share: expected none on attention experts, got 0.5"),
        (Mode(bias=(1.0,)), "Mode.bias: expected 6 numbers"),
        (Mode(temperature=2.0), "Mode.temperature: expected a TopK router, HeadGates has no temperature"),
        (Mode(round_robin=True), "expected one choice among all experts, got 3 heads"),
    ],
)
def test_a_mode_that_does_not_fit_changes_nothing(mode, message):
    layer = choice(HeadGates(3, 1), num_choosers=3)
    layer.set_mode(Mode(bias=(0.0,) * 6))
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.set_mode(mode)
    assert layer.mode == Mode(bias=(0.0,) * 6)


def test_the_bias_of_heads_is_each_heads_own():
    """Each of three heads gets what quantile balancing gives it alone, and the router chooses by it."""
    layer, x = choice(HeadGates(3, 1), num_choosers=3), torch.randn(600, 8)
    with torch.no_grad():
        layer.router.weight[0] += 3.0
    scores = decide(layer, x)[0].selection_TE.detach()
    bias, violation = balancing_bias(scores, 3, 3)
    alone = [balancing_bias(scores[:, h : h + 2], 1)[0] for h in (0, 2, 4)]
    assert torch.equal(bias, torch.cat(alone))
    layer.set_mode(Mode(bias=tuple(bias.tolist())))
    counts = decide(layer, x)[0].expert_ids_N.bincount(minlength=6).double()
    assert counts.view(3, 2).sum(1).tolist() == [600, 600, 600]
    assert float(counts.max() / counts.mean() - 1) == pytest.approx(violation)
    assert violation < 0.02


# --------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("kind", MODELS)
def test_router_faults_go_in_and_out_again(kind, trained):
    model, layer = copy.deepcopy(trained[kind]), LAYERS[kind]
    bench = Bench(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for fault in (Collapse(layer, 3, 40.0), DeadExpert(layer, 3), LogitBlowUp(layer), RouterCorruption(layer)):
        done = inject(model, fault, bench.held_out_loss)
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert changed == [f"{layer}.router.weight"], fault
        done.remove()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), fault


def test_a_runaway_bias_needs_a_balancer():
    config = replace(MODELS["moa"], attention_moe=replace(MODELS["moa"].attention_moe, balance=(BiasBalance(),)))
    model, layer = Decoder(config), LAYERS["moa"]
    done = inject(model, BiasRunaway(layer, 3))
    assert model.get_submodule(layer).balancer.bias_E.tolist() == [0, 0, 0, 10, 0, 0, 0, 0]
    done.remove()
    assert not model.get_submodule(layer).balancer.bias_E.any()
    with pytest.raises(ValueError, match="expected a layer with a selection bias"):
        inject(Decoder(MODELS["moa"]), BiasRunaway(layer, 3))


def test_faults_of_experts_that_are_the_attentions_are_refused(trained):
    model, layer = trained["moh"], LAYERS["moh"]
    with pytest.raises(ValueError, match=r"NaNExpert.layer: expected experts with stacked weights"):
        inject(model, NaNExpert(layer, 0))
    with pytest.raises(ValueError, match=r"SlowExpert.layer: expected an MoE layer, .* chooses attention experts"):
        inject(model, SlowExpert(layer, 0, 0.01))
    with pytest.raises(ValueError, match="SlowRank: expected a model with MoE layers"):
        inject(model, SlowRank(0.01))


def test_a_router_that_is_no_number_is_named():
    moe = MoEConfig(num_experts=4, hidden_dim=8)
    model = Decoder(replace(MODELS["switch_head"], moe=moe))
    with torch.no_grad():
        model.get_submodule(LAYERS["switch_head"]).router.weight[0, 0] = torch.nan
    found = broken(model)
    assert (found.rule, found.layer, found.expert) == ("not_finite", LAYERS["switch_head"], None)
