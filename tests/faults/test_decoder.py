"""Every fault of a model in a whole decoder: one layer is hit, and after more training what was learned stays."""

import pytest
import torch
from tests.bits import bits

from equipoise.faults import (
    BiasRunaway,
    Collapse,
    DeadExpert,
    Drift,
    LogitBlowUp,
    NaNExpert,
    RouterCorruption,
    SlowExpert,
    SlowRank,
    inject,
)
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.monitor.recorder import Recorder
from equipoise.routing import BiasBalance, TopK

B, S, E, K = 32, 16, 8, 2
FIRST, LAYER = "layers.1.mlp", "layers.2.mlp"
SLOW = [SlowExpert(LAYER, 5, 0.001), SlowRank(0.001)]
WRITTEN = [
    Collapse(LAYER, 5, 40.0), Collapse(LAYER, 5, 40.0, also=(1,)), Drift(LAYER, 5, 40.0, steps=4), DeadExpert(LAYER, 5),
    LogitBlowUp(LAYER), RouterCorruption(LAYER), BiasRunaway(LAYER, 5), NaNExpert(LAYER, 5),
]  # fmt: skip


@pytest.fixture
def model():
    moe = MoEConfig(num_experts=E, hidden_dim=16, router=TopK(k=K), balance=(BiasBalance(),))
    sizes = {"vocab_size": 64, "dim": 32, "num_layers": 3, "num_heads": 4, "hidden_dim": 32, "max_seq_len": S}
    return Decoder(DecoderConfig(**sizes, moe=moe, moe_layers=(1, 2), init_std=0.2))


def tokens():
    return torch.randint(0, 64, (B, S), generator=torch.Generator().manual_seed(3))


def put(model, fault):
    injection = inject(model, fault, lambda: model(tokens()))
    for _ in range(getattr(fault, "steps", 0)):
        injection.advance()
    return injection


@torch.no_grad()
def routing(model):
    recorder = Recorder(model)
    model.eval()(tokens())
    recorder.detach()
    return {stats.layer: stats for stats in recorder.flush(1)}


def kind(fault):
    return type(fault).__name__


@pytest.mark.parametrize("fault", [*WRITTEN, *SLOW], ids=kind)
def test_one_layer_is_hit_and_the_model_comes_back_to_the_bit(model, fault):
    before, routed = bits(model), routing(model)
    injection = put(model, fault)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) == (0 if fault in SLOW else 1)
    assert all(name.startswith(f"{LAYER}.") for name in changed)
    now = routing(model)
    assert now[FIRST].counts_E.tolist() == routed[FIRST].counts_E.tolist()
    if fault in SLOW or isinstance(fault, LogitBlowUp | NaNExpert):  # who is chosen stays the same
        assert now[LAYER].counts_E.tolist() == routed[LAYER].counts_E.tolist()
    else:
        assert now[LAYER].counts_E.tolist() != routed[LAYER].counts_E.tolist()
    injection.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert routing(model)[LAYER].counts_E.tolist() == routed[LAYER].counts_E.tolist()


def test_what_each_does_to_the_load(model):
    """Shares of tokens that reach expert 5. Random inputs have little in common: nearly all follow, not all."""
    shares = {}
    for fault in [
        Collapse(LAYER, 5, 40.0),
        Drift(LAYER, 5, 40.0, steps=4),
        DeadExpert(LAYER, 5),
        BiasRunaway(LAYER, 5),
    ]:
        injection = put(model, fault)
        shares[kind(fault)] = routing(model)[LAYER].counts_E[5] / (B * S)
        injection.remove()
    assert shares["Collapse"] == shares["Drift"] > 0.95
    assert shares["BiasRunaway"] == 1.0
    assert shares["DeadExpert"] < 0.05
    stats = routing(model)[LAYER]
    put(model, LogitBlowUp(LAYER, 30.0))
    saturated = routing(model)[LAYER]
    assert saturated.logit_std == pytest.approx(30 * stats.logit_std, rel=1e-4)
    assert saturated.token_entropy < 0.2 * stats.token_entropy


@pytest.mark.parametrize("fault", [fault for fault in WRITTEN if not isinstance(fault, NaNExpert)], ids=kind)
def test_after_training_what_was_learned_stays(model, fault):
    """AdamW goes on with the fault in place. Out comes the change: what the steps have done is left, as in the weight.

    The expected value is worked in fp64 from three copies: clean, with the fault, and after the steps.
    """
    bias = isinstance(fault, BiasRunaway)
    name = f"{LAYER}.balancer.bias_E" if bias else f"{LAYER}.router.weight"
    clean = bits(model)[name].double()
    injection = put(model, fault)
    faulty = bits(model)[name].double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model.train()(tokens()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in model.moe_layers.values():
            layer.balancer.update()
    trained = bits(model)
    injection.remove()
    learned = (trained[name].double() - faulty) / (fault.intensity if isinstance(fault, LogitBlowUp) else 1.0)
    assert learned.abs().max() > 0
    after = bits(model)
    scale = torch.maximum(faulty.abs(), clean.abs())
    assert ((after[name] - (clean + learned)).abs() <= 4 * torch.finfo(torch.float32).eps * scale).all()
    assert all(torch.equal(after[other], tensor) for other, tensor in trained.items() if other != name)
