"""What is kept of a model's routers: exact names and values, of our layers and transformers', and enough to go back."""

import pytest
import torch
from tests.monitor.transformers_models import batch, build
from torch import nn

from equipoise.layer import Capacity, FeedForward, MoE, reduce_and_update
from equipoise.layer.mode import Mode
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.recovery.router_state import of_layer, router_state
from equipoise.recovery.swap import swap
from equipoise.routing import (
    BiasBalance,
    DropRateCoef,
    Hash,
    NoisyTopK,
    QuantileBalance,
    ReLURouting,
    SparsityCoef,
    SparsityLoss,
    SwitchLoss,
    Threshold,
    TopK,
)
from equipoise.routing.adaptive import Adaptive

E, D, S, LAYERS = 4, 16, 12, 2


def decoder(router, *balance, capacity=None, shared=0):
    torch.manual_seed(0)
    moe = MoEConfig(
        num_experts=E, hidden_dim=8, router=router, balance=balance, capacity=capacity, shared_experts=shared
    )
    sizes = {"vocab_size": 32, "dim": D, "num_layers": LAYERS, "num_heads": 2, "hidden_dim": 16, "max_seq_len": S}
    return Decoder(DecoderConfig(**sizes, moe=moe))


def named(*parts):
    return {f"layers.{layer}.mlp.{part}" for layer in range(LAYERS) for part in parts}


KINDS = {
    "bias": (
        lambda: decoder(TopK(k=2), SwitchLoss(coef=0.01), BiasBalance(rule="smooth"), shared=1),
        ("router.weight", "balancer.frozen", "balancer.bias_E", "balancer.momentum_E"),
    ),
    "quantile": (
        lambda: decoder(TopK(k=2), QuantileBalance()),
        ("router.weight", "balancer.frozen", "balancer.bias_E", "balancer.active"),
    ),
    "drop-rate coefficient": (
        lambda: decoder(TopK(k=2), SwitchLoss(coef=DropRateCoef(beta=0.5)), capacity=Capacity(factor=0.5)),
        ("router.weight", "coefs.switch_micro.frozen", "coefs.switch_micro.value"),
    ),
    "threshold": (
        lambda: decoder(Threshold(k=2, warmup=1, ema=0.5)),
        ("router.weight", "router.state.frozen", "router.state.running_E", "router.state.updates"),
    ),
    "sparsity": (
        lambda: decoder(ReLURouting(k=2), SparsityLoss(coef=SparsityCoef())),
        ("router.weight", "coefs.sparsity.frozen", "coefs.sparsity.value"),
    ),
    "noisy": (lambda: decoder(NoisyTopK(k=2, init_std=0.1)), ("router.weight", "router.noise_weight")),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    make, parts = request.param
    return make(), named(*parts)


def tokens(seed):
    return torch.randint(0, 32, (4, S), generator=torch.Generator().manual_seed(seed))


def train(model, seed, steps=3):
    """Train, so that everything that adapts moves."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        model(tokens(seed + step)).square().mean().backward()
        optimizer.step()
        reduce_and_update(model.moe_layers.values())


@torch.no_grad()
def served(model):
    model.eval()
    return model(tokens(99))


def test_exactly_the_routers_and_what_adapts_with_their_values(kind):
    model, expected = kind
    train(model, 1)
    state, whole = router_state(model), model.state_dict()
    assert set(state) == expected
    assert all(torch.equal(tensor, whole[name]) and tensor.dtype == whole[name].dtype for name, tensor in state.items())


def test_nothing_that_adapts_and_is_saved_is_forgotten(kind):
    model, _ = kind
    saved = set(model.state_dict())
    adapts = {
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, Adaptive)
        for buffer, _ in module.named_buffers()
    }
    assert adapts & saved <= set(router_state(model))


def test_they_are_clones(kind):
    model, _ = kind
    state = router_state(model)
    before = {name: tensor.clone() for name, tensor in state.items()}
    live = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not live & {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    train(model, 1)
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert not any(tensor.requires_grad for tensor in state.values())


def test_training_moves_it_and_swapping_it_back_with_the_rest_gives_the_same_outputs(kind):
    """The routers alone are kept; with the other weights as they were, the model computes the same to the bit."""
    model, _ = kind
    train(model, 1)
    state, before = router_state(model), served(model)
    rest = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in state}
    train(model, 50)
    after = served(model)
    assert not torch.equal(after, before)
    done = swap(model, state)
    assert set(done.changed) <= set(state)
    assert any("weight" in name for name in done.changed)
    swap(model, rest)
    assert torch.equal(served(model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in router_state(model).items())


def test_only_routers_trained_means_routers_are_enough_to_go_back(kind):
    model, _ = kind
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".router." in name)
    state, before = router_state(model), served(model)
    train(model, 1)
    trained = served(model)
    swap(model, state)
    assert torch.equal(served(model), before)
    assert not torch.equal(trained, before)


def test_the_bias_of_a_balancer_comes_back_although_no_parameter_changed():
    model = decoder(TopK(k=1), BiasBalance(rate=0.5))
    state, before = router_state(model), served(model)
    model.train()
    for seed in range(3):
        with torch.no_grad():
            model(tokens(seed))
        reduce_and_update(model.moe_layers.values())
    moved = served(model)
    done = swap(model, state)
    assert set(done.changed) == named("balancer.bias_E")
    assert torch.equal(served(model), before)
    assert not torch.equal(moved, before)


def test_of_layer_is_one_layer_and_no_other_that_begins_alike():
    state = {name: torch.zeros(1) for name in ("a.1.router.weight", "a.10.router.weight", "a.1.balancer.bias_E")}
    assert set(of_layer(state, "a.1")) == {"a.1.router.weight", "a.1.balancer.bias_E"}
    assert set(of_layer(state, "a.10")) == {"a.10.router.weight"}
    assert of_layer(state, "b") == {}


def test_of_layer_leaves_out_the_dense_path():
    state = {name: torch.zeros(1) for name in ("a.router.weight", "a.dense.up", "dense.up", "router.weight")}
    assert set(of_layer(state, "a")) == {"a.router.weight"}
    assert set(of_layer(state, "")) == {"a.router.weight", "a.dense.up", "router.weight"}


def test_a_layer_by_itself_and_below_others():
    layer = MoE(D, 8, E)
    assert set(router_state(layer)) == {"router.weight"}
    assert set(router_state(nn.ModuleDict({"b": nn.Sequential(layer)}))) == {"b.0.router.weight"}


def test_a_mode_in_force_is_not_part_of_it():
    model = decoder(TopK(k=2), BiasBalance())
    before = set(router_state(model))
    layer = model.moe_layers["layers.1.mlp"]
    layer.set_mode(Mode(dense_share=0.5), FeedForward(D, 8))
    assert set(router_state(model)) == before


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.ModuleDict({"mlp": FeedForward(D, 8)})])
def test_a_model_without_moe_layers_has_none(model):
    with pytest.raises(
        ValueError, match=f"router_state: {type(model).__name__} has no MoE layer whose router could be"
    ):
        router_state(model)


def test_the_table_of_a_router_that_hashes_is_kept():
    layer = MoE(D, 8, E, router=Hash(vocab_size=32))
    assert {name.split(".")[0] for name in router_state(layer)} == {"router"}


# ----------------------------------------------------------------------------------------------------- transformers

FAMILIES = {
    "Mixtral": ("model.layers.{}.mlp.gate.weight",),
    "Olmoe": ("model.layers.{}.mlp.gate.weight",),
    "Qwen2Moe": ("model.layers.{}.mlp.gate.weight",),
    "DeepseekV3": ("model.layers.{}.mlp.gate.weight", "model.layers.{}.mlp.gate.e_score_correction_bias"),
    "GptOss": ("model.layers.{}.mlp.router.weight", "model.layers.{}.mlp.router.bias"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_routers_by_exact_name_and_the_way_back(family):
    model = build(family)
    state, whole = router_state(model), model.state_dict()
    assert set(state) == {name.format(layer) for name in FAMILIES[family] for layer in range(2)}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in state.items())
    tokens, mask = batch()

    def output():
        with torch.no_grad():
            return model(input_ids=tokens, attention_mask=mask).logits

    before = output()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in state:
                tensor.normal_()
    assert not torch.equal(output(), before)
    done = swap(model, of_layer(state, "model.layers.0.mlp"))
    assert set(done.changed) == {name.format(0) for name in FAMILIES[family]}
    swap(model, of_layer(state, "model.layers.1.mlp"))
    assert torch.equal(output(), before)


def test_the_correction_bias_of_deepseek_alone_comes_back():
    model = build("DeepseekV3")
    state = router_state(model)
    bias = model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    with torch.no_grad():
        bias.copy_(torch.arange(len(bias)))
    assert swap(model, state).changed == ("model.layers.1.mlp.gate.e_score_correction_bias",)
    assert torch.equal(bias, state["model.layers.1.mlp.gate.e_score_correction_bias"])
