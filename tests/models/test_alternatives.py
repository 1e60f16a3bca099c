"""PEER and zero-computation experts in the decoder: causal, decoding as prefilling, counted; and who refuses what."""

import json
import re
from dataclasses import replace

import pytest
import torch

from equipoise.convert.families import family_for
from equipoise.convert.fields import ConversionError
from equipoise.layer import MoE, Peer, ZeroExperts
from equipoise.models.cache import ContiguousCache
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.models.generate import generate
from equipoise.models.mamba import Mamba
from equipoise.models.parameters import parameter_counts
from equipoise.models.tokenizer import Tokenizer
from equipoise.parallel.apply import apply_expert_parallel
from equipoise.plan.fit.model_file import read_config
from equipoise.recovery.router_state import router_state
from equipoise.routing import SwitchLoss, TopK
from equipoise.serve.engine import Engine
from equipoise.serve.request import Request, Sampling

B, S = 2, 11
EXACT = {"rtol": 0, "atol": 1e-10}
ZERO = ZeroExperts(zero=1, copy=1, constant=2, weight=0.75)
MOE = MoEConfig(num_experts=4, hidden_dim=16, router=TopK(k=3), balance=(SwitchLoss(),), zero_experts=ZERO)
BYTES = Tokenizer("bytes", {bytes([byte]): byte for byte in range(256)})
PEER = Peer(num_experts=36, heads=2, k=3)
VARIANTS = {
    "peer": {"moe": None, "moe_layers": None, "peer": PEER},
    "peer and moe": {"moe": MOE, "moe_layers": (1,), "peer": PEER, "peer_layers": (0, 2)},
    "zero experts": {"moe": MOE, "moe_layers": None},
    "zero experts and gpt2": {"moe": MOE, "moe_layers": None, "style": "gpt2", "qk_norm": False},
    "mamba, peer and zero experts": {
        "moe": MOE, "moe_layers": (1,), "peer": PEER, "peer_layers": (0,), "mamba": Mamba(), "mamba_layers": (0, 1),
    },
    "mamba behind a shortcut": {
        "moe": replace(MOE, shared_experts=1, shortcut="pos2"), "moe_layers": (1,), "mamba": Mamba(),
    },
}  # fmt: skip
EACH = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture
def make_model(make_config):
    def make(name: str, **overrides) -> Decoder:
        torch.manual_seed(0)
        return Decoder(make_config(**VARIANTS[name] | overrides)).double().eval()

    return make


def tokens() -> torch.Tensor:
    return torch.randint(0, 61, (B, S), generator=torch.Generator().manual_seed(1))


@EACH
def test_nothing_looks_ahead(make_model, name):
    model = make_model(name)
    whole = model(tokens())
    for cut in range(1, S):
        torch.testing.assert_close(model(tokens()[:, :cut]), whole[:, :cut], **EXACT)
    other = tokens()
    other[:, -1] = (other[:, -1] + 1) % 61
    torch.testing.assert_close(model(other)[:, :-1], whole[:, :-1], **EXACT)
    assert (model(other)[:, -1] - whole[:, -1]).abs().max() > 1e-3


@EACH
def test_decoding_is_prefilling_and_padding_changes_nothing(make_model, name):
    model = make_model(name)
    whole = model(tokens())
    cache = ContiguousCache(model.config, B, S, torch.float64)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens().split([4, 1, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **EXACT)
    for left in (0, 3):
        wide, padding = torch.zeros(B, S + 3, dtype=torch.int64), torch.ones(B, S + 3, dtype=torch.bool)
        wide[:, left : left + S], padding[:, left : left + S] = tokens(), False
        torch.testing.assert_close(model(wide, padding_mask=padding)[:, left : left + S], whole, **EXACT)


@EACH
def test_text_is_generated_the_same_with_a_cache_and_without(make_model, name):
    model = make_model(name)
    with_cache, without = (generate(model, tokens(), 9, seed=3, use_cache=each) for each in (True, False))
    assert torch.equal(with_cache, without)


@EACH
def test_parameters_are_counted_and_the_configuration_survives_json(make_model, name):
    model = make_model(name)
    config, counts = model.config, parameter_counts(model.config)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    idle = sum(MOE.hidden_dim * 32 * (2 if config.style == "gpt2" else 3) * (4 - 3) for _ in config.moe_layer_ids)
    idle += sum(2 * 32 * (36 - 2 * 3) for _ in config.peer_layer_ids)
    assert counts.total - counts.active == idle
    assert DecoderConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["type"] == "DecoderConfig"


@EACH
def test_experts_computed_again_in_backward_have_the_same_gradients(make_model, name):
    config = make_model(name).config
    if config.moe is None or config.moe.shortcut:
        return
    gradients = []
    for again in (False, True):
        model = make_model(name, moe=replace(config.moe, checkpoint_experts=again)).train()
        model(tokens()).sin().sum().backward()
        gradients.append({n: parameter.grad for n, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients, **EXACT)


def test_a_finder_of_single_neurons_is_kept_with_routers(make_model):
    names = set(router_state(make_model("peer and moe")))
    assert {"layers.0.mlp.router.keys", "layers.1.mlp.router.weight", "layers.2.mlp.router.query.weight"} <= names
    assert not any(name.endswith(("down", "up")) for name in names)


# ---------------------------------------------------------------------------------------------- served or refused


@pytest.mark.parametrize("name", [name for name in VARIANTS if "gpt2" not in name])
def test_the_engine_answers_as_generate_does(make_model, name):
    model = make_model(name, vocab_size=257)
    engine = Engine(model, BYTES, num_blocks=16, block_size=4)
    prompts, answers = tokens()[:, :5].tolist(), {}
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), tuple(prompt), 8, Sampling(temperature=0.0)))
    while engine.has_work:
        for output in engine.step():
            answers.setdefault(output.id, []).extend(output.token_ids)
    expected = generate(model, tokens()[:, :5], 8, temperature=0)[:, 5:].tolist()
    assert [answers[str(number)] for number in range(B)] == expected


def test_a_cache_without_states_is_refused(make_model):
    model = make_model("mamba, peer and zero experts")
    keys_alone = ContiguousCache(replace(model.config, mamba=None, mamba_layers=None), B, S, torch.float64)

    class KeysAlone:
        longest, place, attend, advance = keys_alone.longest, keys_alone.place, keys_alone.attend, keys_alone.advance

    with torch.no_grad(), pytest.raises(ValueError, match="cache: expected one that keeps the states of"):
        model(tokens(), cache=KeysAlone())


def test_a_layer_with_zero_experts_is_not_spread_over_ranks():
    layer = MoE(8, 4, 4, zero_experts=ZeroExperts())
    message = "layer: expected no zero_experts in a layer that is spread over ranks, got ZeroExperts(zero=1, copy=1"
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_expert_parallel(torch.nn.ModuleDict({"layer": layer}), None)


@pytest.mark.parametrize(
    ("name", "part", "unplanned"),
    [
        ("peer", "single-neuron experts", "peer"),
        ("zero experts", "compute nothing", "zero_experts"),
        ("mamba behind a shortcut", "Mamba's", "mamba, zero_experts"),
    ],
)
def test_neither_converter_nor_planner_leaves_a_part_out(make_model, tmp_path, name, part, unplanned):
    config = make_model(name).config
    if config.moe is not None and config.moe.shortcut:
        config = replace(config, moe=replace(config.moe, shortcut=None))
    with pytest.raises(ConversionError, match=part):
        family_for(config)
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    with pytest.raises(ValueError, match=f"expected attention and experts that compute, got {unplanned}: the planner"):
        read_config(path)


def test_a_block_has_one_feed_forward_part(make_config):
    with pytest.raises(
        ValueError, match=r"peer_layers: expected other layers than those with an MoE, got \[1\] for both"
    ):
        make_config(moe=MOE, moe_layers=(1, 2), peer=PEER, peer_layers=(0, 1))
    with pytest.raises(
        ValueError, match=r"peer_layers: expected None without peer, got \(0,\)\. Set peer=Peer\(\.\.\.\)"
    ):
        make_config(peer_layers=(0,))
