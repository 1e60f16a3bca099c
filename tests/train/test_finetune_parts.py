"""The parts of fine-tuning by themselves: what is held for a weight, which experts a task uses, the adapter in PEFT."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.routing import ReLURouting, SparsityLoss, TopK
from equipoise.routing.coefficients import SparsityCoef
from equipoise.train.finetune.adapter import peft_config, peft_tensors
from equipoise.train.finetune.config import FinetuneConfig
from equipoise.train.finetune.groups import groups_of
from equipoise.train.finetune.held import LowRank, Rows
from equipoise.train.finetune.task_experts import Uses, choose, read_choice, smallest_set, used_experts, write_choice
from equipoise.train.finetune.tuning import held_weights

SIZES = {"vocab_size": 40, "dim": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 24, "max_seq_len": 16}


def decoder(**moe):
    config = MoEConfig(**{"num_experts": 4, "hidden_dim": 8, "router": TopK(k=2)} | moe)
    return Decoder(DecoderConfig(**SIZES, moe=config, moe_layers=(1,), qk_norm=True))


# ------------------------------------------------------------------------------------------------- groups


def test_every_weight_has_its_group():
    groups = groups_of(decoder(shared_experts=1, shared_gate=True))
    layer = "layers.1.mlp"
    assert {name for name, group in groups.items() if group == "router"} == {f"{layer}.router.weight"}
    assert {name for name, group in groups.items() if group == "experts"} == {
        f"{layer}.experts.gate_up_proj",
        f"{layer}.experts.down_proj",
    }
    shared = {name for name, group in groups.items() if group == "shared"}
    assert shared == {name for name in groups if f"{layer}.shared" in name}
    assert f"{layer}.shared_gate.weight" in shared
    assert {name for name, group in groups.items() if group == "attention"} == {n for n in groups if ".self_attn." in n}
    assert groups["embed_tokens.weight"] == groups["layers.0.mlp.down_proj.weight"] == groups["norm.weight"] == "rest"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "experts", "freeze_experts": True}, r"nothing would be trained with train=experts, freeze_experts"),
        ({"train": "router", "lora": 4}, r"nothing would be trained with train=router, lora=4"),
        ({"train": "router", "freeze_router": 5}, r"freeze_router: expected 0 with train=router, got 5"),
        ({"train": "task-experts", "lora": 4}, r"lora: expected 0 with train=task-experts"),
        ({"lora": 4, "move_bias": True}, r"move_bias: expected False with lora"),
        ({"train": "heads"}, r"train: expected one of all, router, non-moe, experts, task-experts, got 'heads'"),
        ({"lr_router": -1.0}, r"lr_router: expected 0 or more, got -1"),
        ({"task_share": 1.5}, r"task_share: expected a share above 0 and up to 1, got 1\.5"),
        ({"freeze_router": -1}, r"freeze_router: expected 0 or more steps, got -1"),
    ],
)
def test_what_would_train_nothing_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**change)


# ------------------------------------------------------------------------------------------------- task experts


def test_the_smallest_set_by_hand():
    scores = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    assert smallest_set(scores, 0.4) == (1,)  # 0.4 is reached
    assert smallest_set(scores, 0.41) == (1, 3)  # 0.4, 0.7
    assert smallest_set(scores, 0.8) == (1, 2, 3)  # 0.4, 0.7, 0.9
    assert smallest_set(scores, 1.0) == (0, 1, 2, 3)
    assert smallest_set(torch.full((4,), 0.25, dtype=torch.float64), 0.5) == (0, 1)  # ties: the lower index first


def test_the_smallest_set_is_the_smallest_of_all_sets():
    """Against all 255 sets of eight experts."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.dirichlet(np.full(8, 0.5))
        share = float(rng.uniform(0.05, 0.95))
        sets = [[e for e in range(8) if number >> e & 1] for number in range(1, 256)]
        fewest = min(len(chosen) for chosen in sets if scores[chosen].sum() >= share)
        chosen = smallest_set(torch.tensor(scores), share)
        assert len(chosen) == fewest
        assert scores[list(chosen)].sum() >= share
        assert scores[list(chosen)].sum() == pytest.approx(np.sort(scores)[::-1][:fewest].sum())


def test_scores_by_hand():
    """Three tokens of top-2. Weights: t0 (e0 0.9, e1 0.1), t1 (e0 0.8, e2 0.2), t2 (e1 0.7, e2 0.3)."""
    uses = Uses(4)
    uses.counts_E += torch.tensor([2, 2, 2, 0])
    uses.weights_E += torch.tensor([1.7, 0.8, 0.5, 0.0], dtype=torch.float64)
    uses.num_tokens = 3
    assert uses.scores("gate").tolist() == pytest.approx([1.7 / 3, 0.8 / 3, 0.5 / 3, 0.0])  # weights of a token: sum 1
    assert uses.scores("token").tolist() == pytest.approx([2 / 6, 2 / 6, 2 / 6, 0.0])  # (1/3) sum of 1/K
    made = FinetuneConfig(train="task-experts", task_share=0.6)
    assert choose({"layer": uses}, made)[0].chosen == (0, 1)
    assert choose({"layer": uses}, replace(made, task_score="token"))[0].chosen == (0, 1)


def test_uses_are_what_a_loop_over_tokens_counts(tmp_path):
    """The slow twin: token by token, from the decisions themselves."""
    model = decoder().eval()
    decisions = []
    model.moe_layers["layers.1.mlp"].tap.register_forward_hook(lambda m, a, routed: decisions.append(routed.decision))
    with used_experts(model) as uses, torch.no_grad():
        for _ in range(3):
            model(torch.randint(40, (2, 9)))
    gate, ratio, tokens = [0.0] * 4, [0.0] * 4, 3 * 2 * 9
    for decision in decisions:
        for token in range(decision.num_tokens):
            own = decision.token_ids_N == token
            for expert, weight in zip(
                decision.expert_ids_N[own].tolist(), decision.weights_N[own].tolist(), strict=True
            ):
                gate[expert] += weight / tokens
                ratio[expert] += 1 / 2 / tokens
    used = uses["layers.1.mlp"]
    assert used.num_tokens == tokens
    assert int(used.counts_E.sum()) == 2 * tokens
    assert used.scores("gate").tolist() == pytest.approx(gate, abs=1e-6)
    assert used.scores("token").tolist() == pytest.approx(ratio)
    made = FinetuneConfig(train="task-experts")
    choice = choose(uses, made)
    write_choice(tmp_path, choice, made)
    assert read_choice(tmp_path) == choice
    assert json.loads((tmp_path / "task_experts.json").read_text())["share"] == 0.1
    (tmp_path / "task_experts.json").write_text('{"layers": [{}]}')
    with pytest.raises(ValueError, match=r"task_experts\.json: expected the experts that this run trains.*restore it"):
        read_choice(tmp_path)


def test_a_router_without_a_fixed_k_is_scored_too():
    loss = SparsityLoss(coef=SparsityCoef(initial=1.0))
    model = decoder(router=ReLURouting(k=1), balance=(loss,)).eval()
    with used_experts(model) as uses, torch.no_grad():
        model(torch.randint(40, (2, 9)))
    for score in ("gate", "token"):
        assert float(uses["layers.1.mlp"].scores(score).sum()) == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------- what is held


def test_rows_train_like_a_masked_gradient_and_leave_the_others_alone():
    """The slow twin: AdamW without decay on the whole weight, whose gradient is zero but for the chosen experts."""
    start = torch.randn(5, 3, 4)
    weight, masked = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    rows = Rows(weight, (1, 3))
    fast = torch.optim.AdamW(rows.parameters, lr=0.1, weight_decay=0.0)
    slow = torch.optim.AdamW([masked], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        gradient = torch.randn(5, 3, 4)
        weight.grad, masked.grad = gradient.clone(), torch.zeros(5, 3, 4)
        masked.grad[[1, 3]] = gradient[[1, 3]]
        rows.pull()
        assert weight.grad is None
        fast.step()
        slow.step()
        rows.push()
    assert torch.equal(weight, masked)
    assert torch.equal(weight[[0, 2, 4]], start[[0, 2, 4]])
    assert fast.state[rows.parameters[0]]["exp_avg"].shape == (2, 3, 4)


def test_decay_is_on_the_chosen_rows_alone():
    weight = nn.Parameter(torch.ones(3, 2, 2))
    rows = Rows(weight, (1,))
    optimizer = torch.optim.AdamW(rows.parameters, lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros(3, 2, 2)
    rows.pull()
    optimizer.step()
    rows.push()
    assert torch.equal(weight[[0, 2]], torch.ones(2, 2, 2))
    assert torch.allclose(weight[1], torch.full((2, 2), 0.95))


def test_rows_follow_a_repair():
    weight = nn.Parameter(torch.zeros(3, 2))
    rows = Rows(weight, (0,))
    weight.data[0] = 7.0  # a rollback, say
    weight.grad = torch.zeros(3, 2)
    rows.pull()
    rows.push()
    assert weight[0].tolist() == [7.0, 7.0]


@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 5)], ids=["matrix", "stacked"])
def test_low_rank_gradients_are_those_of_autograd(shape):
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    held = LowRank(weight, 2, 1.5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        held.b.copy_(torch.randn_like(held.b))
    held.push()
    x, target = torch.randn(5, dtype=torch.float64), torch.randn(shape[:-1], dtype=torch.float64)
    base = held.tensors()["base"]
    a, b = held.a.detach().requires_grad_(), held.b.detach().requires_grad_()
    ((base + 1.5 * (b @ a)) @ x - target).square().sum().backward()  # the slow twin
    ((weight @ x) - target).square().sum().backward()
    held.pull()
    assert torch.allclose(held.a.grad, a.grad)
    assert torch.allclose(held.b.grad, b.grad)


def test_low_rank_begins_as_the_base():
    weight = nn.Parameter(torch.randn(4, 6, 5))
    before = weight.detach().clone()
    held = LowRank(weight, 2, 2.0, torch.Generator().manual_seed(0))
    held.push()
    assert torch.equal(weight, before)
    assert 0 < float(held.a.detach().abs().max()) <= 5**-0.5


def test_peft_reads_the_adapter_and_computes_the_same(tmp_path):
    """PEFT is the independent twin: our factors in its wrappers give our merged model's logits and gradients."""
    peft = pytest.importorskip("peft", reason="the adapter's twin is PEFT: pip install 'equipoise[dev]'")
    model = decoder()
    tune = FinetuneConfig(base="runs/base", lora=3, lora_alpha=6.0)
    twin = decoder()
    twin.load_state_dict(model.state_dict())
    held = held_weights(model, tune, (), seed=1)
    assert all(isinstance(each, LowRank) for each in held.values())
    assert len(held) == 2 * 4 + 2  # four projections in each of two layers, two stacks of experts in one
    with torch.no_grad():
        for each in held.values():
            each.b.copy_(torch.randn_like(each.b) * 0.05)
            each.push()

    fields = {name: value for name, value in peft_config(held, tune).items() if name != "peft_type"}
    config = peft.LoraConfig(**fields | {"inference_mode": False})
    peft.inject_adapter_in_model(config, twin)
    prefix = "base_model.model."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in peft_tensors(held).items()}
    result = peft.set_peft_model_state_dict(twin, tensors)
    assert not result.unexpected_keys
    tokens = torch.randint(40, (2, 9))
    expected, found = model(tokens), twin(tokens)
    assert torch.allclose(expected, found, atol=1e-5)
    assert not torch.allclose(found, decoder()(tokens), atol=1e-3)

    for logits in (expected, found):
        logits.square().mean().backward()
    for each in held.values():
        each.pull()
    own = peft_tensors({name: Gradients(each) for name, each in held.items()})
    grads = {name: p.grad for name, p in twin.named_parameters() if ".lora_" in name}
    assert len(grads) == len(own) == 20
    for name, gradient in grads.items():
        mine = own[prefix + name.replace(".default", "")]
        assert torch.allclose(mine, gradient, atol=1e-6), name


class Gradients:
    """Of factors, laid out as they are."""

    def __init__(self, held):
        self.a, self.b = held.a.grad, held.b.grad
