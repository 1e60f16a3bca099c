"""Every fault of a model: it changes the layer that it names and nothing else, and is taken out again exactly."""

import pytest
import torch
from tests.monitor.transformers_models import batch, build

from equipoise.faults import (
    FAULTS,
    BiasRunaway,
    Collapse,
    DeadExpert,
    Drift,
    LogitBlowUp,
    NaNExpert,
    RouterCorruption,
    SlowExpert,
    SlowRank,
    from_json,
    inject,
    to_json,
)
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.monitor.recorder import Recorder
from equipoise.routing import BiasBalance, TopK

OURS = "layers.2.mlp"


def faults_of(layer):
    return [
        Collapse(layer, 5, 20.0),
        Collapse(layer, 5, 20.0, also=(2,)),
        Drift(layer, 5, 20.0, steps=3),
        DeadExpert(layer, 5, 20.0),
        LogitBlowUp(layer, 8.0),
        RouterCorruption(layer, 2.0, seed=3),
        NaNExpert(layer, 5, seed=3),
        SlowExpert(layer, 5, 0.002),
        SlowRank(0.002),
    ]


CASES = [*faults_of(OURS), BiasRunaway(OURS, 5, 20.0)]
NAMES = [f"{type(fault).__name__}-{number}" for number, fault in enumerate(CASES)]
EXACT = (NaNExpert, SlowExpert, SlowRank)  # others add and subtract: as near as fp32 rounding


def ours():
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=8, hidden_dim=16, router=TopK(k=2), balance=(BiasBalance(),))
    sizes = {"vocab_size": 64, "dim": 32, "num_layers": 3, "num_heads": 4, "hidden_dim": 32, "max_seq_len": 16}
    return Decoder(DecoderConfig(**sizes, moe=moe, moe_layers=(1, 2), init_std=0.2)).eval()


def tokens():
    return torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def outputs(model):
    result = model(tokens())
    return result if isinstance(result, torch.Tensor) else result.logits


def counts(model):
    recorder = Recorder(model)
    outputs(model)
    recorder.detach()
    return {stats.layer: stats.counts_E.tolist() for stats in recorder.flush(1)}


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("fault", CASES, ids=NAMES)
def test_only_the_named_layer_is_touched_and_removal_puts_it_back(fault):
    model = ours()
    before, y, load = bits(model), outputs(model), counts(model)
    injection = inject(model, fault, lambda: outputs(model))
    for _ in range(5):
        injection.advance()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all(name.startswith(OURS) for name in changed)
    assert changed or isinstance(fault, SlowExpert | SlowRank)
    assert counts(model)["layers.1.mlp"] == load["layers.1.mlp"]
    injection.remove()
    injection.remove()
    after = model.state_dict()
    for name, tensor in before.items():
        tolerance = 0.0 if isinstance(fault, EXACT) else 2e-5
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=tolerance)
    torch.testing.assert_close(outputs(model), y, rtol=0, atol=0.0 if isinstance(fault, EXACT) else 1e-3)


@pytest.mark.parametrize("fault", CASES, ids=NAMES)
def test_json_round_trip(fault):
    assert from_json(to_json(fault)) == fault


def test_what_each_does_to_the_load():
    """512 tokens at top-2 of 8 experts, 128 to each when even. Random inputs have most of them in common, not all."""
    expected = {
        Collapse(OURS, 5, 40.0): lambda c: c[5] > 460,
        Collapse(OURS, 5, 60.0, also=(2,)): lambda c: c[5] > 440 and c[2] > 440,
        DeadExpert(OURS, 5, 40.0): lambda c: c[5] < 32,
        BiasRunaway(OURS, 5, 40.0): lambda c: c[5] == 512,
    }
    for fault, shows in expected.items():
        model = ours()
        inject(model, fault, lambda model=model: outputs(model))
        assert shows(counts(model)[OURS]), fault


def test_a_blow_up_moves_nobody_and_a_nan_reaches_the_output():
    model = ours()
    load = counts(model)
    inject(model, LogitBlowUp(OURS, 8.0))
    assert counts(model) == load
    model = ours()
    inject(model, NaNExpert(OURS, 5, seed=1))
    assert not torch.isfinite(outputs(model)).all()


def test_a_drift_is_a_collapse_in_steps():
    model, twin = ours(), ours()
    drift = inject(model, Drift(OURS, 5, 30.0, steps=4), lambda: outputs(model))
    inject(twin, Collapse(OURS, 5, 30.0), lambda: outputs(twin))
    for _ in range(4):
        assert not torch.allclose(
            model.state_dict()[f"{OURS}.router.weight"], twin.state_dict()[f"{OURS}.router.weight"]
        )
        drift.advance()
    for _ in range(2):
        torch.testing.assert_close(
            model.state_dict()[f"{OURS}.router.weight"],
            twin.state_dict()[f"{OURS}.router.weight"],
            rtol=1e-5,
            atol=1e-5,
        )
        drift.advance()


def test_seeds_repeat():
    weights = []
    for seed in (1, 1, 2):
        model = ours()
        inject(model, RouterCorruption(OURS, 2.0, seed=seed))
        weights.append(model.state_dict()[f"{OURS}.router.weight"].clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("family", ["Mixtral", "Olmoe", "DeepseekV3"])
def test_on_transformers(family):
    layer = "model.layers.1.mlp"
    for fault in faults_of(layer) + ([BiasRunaway(layer, 5, 20.0)] if family == "DeepseekV3" else []):
        model = build(family)
        before, y = bits(model), model(batch()[0]).logits
        injection = inject(model, fault, lambda model=model: model(batch()[0]))
        for _ in range(3):
            injection.advance()
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert all(name.startswith(layer) for name in changed)
        assert changed or isinstance(fault, SlowExpert | SlowRank)
        injection.remove()
        torch.testing.assert_close(model(batch()[0]).logits, y, rtol=1e-3, atol=1e-3)


def test_a_layer_without_a_bias_says_so():
    with pytest.raises(ValueError, match=r"BiasRunaway"):
        inject(build("Mixtral"), BiasRunaway("model.layers.1.mlp", 5, 20.0))


def test_the_table_has_all_twelve():
    assert len(FAULTS) == 12
    assert {type(fault) for fault in CASES} <= set(FAULTS.values())
