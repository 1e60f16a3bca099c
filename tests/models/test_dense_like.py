"""Dense at equal active FLOPs and at equal parameters: what is said is what the real models count."""

import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from equipoise.layer import Peer, ZeroExperts
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.models.dense_like import dense_like, feed_forward_flops, mixer_flops
from equipoise.models.mamba import Mamba
from equipoise.models.parameters import parameter_counts
from equipoise.routing import Hash, NoisyTopK, RoundRobin, TopK

B, S = 2, 7
PEER = Peer(num_experts=64, heads=2, k=4)
VARIANTS = {
    "moe in some layers": {},
    "moe everywhere": {"moe_layers": None},
    "gpt2": {"style": "gpt2", "qk_norm": False},
    "hash first": {"moe": {"first_layers": 1, "first_router": Hash(k=1, vocab_size=61)}},
    "noisy": {"moe": {"router": NoisyTopK(k=2)}},
    "peer": {"moe": None, "moe_layers": None, "peer": PEER, "peer_layers": (0, 2)},
    "moe and peer": {"peer": PEER, "peer_layers": (0,)},
    "mamba": {"mamba": Mamba(), "mamba_layers": (0, 2)},
    "other activation": {"moe": {"activation": "gelu"}},
}
EACH = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture
def make(make_config):
    def of(name: str, **moe) -> DecoderConfig:
        fields = dict(VARIANTS[name])
        if fields.get("moe", {}) is not None:
            shared = {"num_experts": 4, "hidden_dim": 16, "router": TopK(k=2), "shared_experts": 1, "shared_gate": True}
            fields["moe"] = MoEConfig(**(shared | fields.get("moe", {}) | moe))
        return make_config(**fields)

    return of


class Quiet:
    """A probe: experts are then computed one by one, in products that torch counts."""

    def begin(self, expert: int, num_rows: int) -> None: ...

    def end(self, expert: int) -> None: ...


def of_bag(weight, ids, offsets, by_freq=False, mode=0, sparse=False, weights=None, *rest, **options) -> int:
    """A weighted sum of rows, which torch does not count. Without weights they are only added up."""
    return 0 if weights is None else 2 * ids[0] * weight[1]


def counted(config: DecoderConfig) -> float:
    """FLOPs of one token's forward in a real model in training, as torch counts them."""
    model = Decoder(config)
    for layer in model.moe_layers.values():
        layer.experts.probes = (Quiet(),)
    bags = {torch.ops.aten._embedding_bag: of_bag, torch.ops.aten._embedding_bag_forward_only: of_bag}
    with FlopCounterMode(display=False, custom_mapping=bags) as counter, torch.no_grad():
        model(torch.randint(0, 61, (B, S)))
    return counter.get_total_flops() / (B * S)


def mixing(config: DecoderConfig) -> float:
    """What is not feed-forward: counted in the same decoder with next to nothing of it."""
    bare = replace(config, moe=None, moe_layers=None, peer=None, peer_layers=None, hidden_dim=1)
    return counted(bare) - feed_forward_flops(bare)


@EACH
def test_feed_forward_flops_are_what_torch_counts(make, name):
    config = make(name)
    assert counted(config) - mixing(config) == pytest.approx(feed_forward_flops(config), rel=1e-12)
    assert feed_forward_flops(config) > 0


def test_mixer_flops_are_what_torch_counts(make_config):
    config = make_config(mamba=Mamba(), moe=None, moe_layers=None)
    without = 2 * config.vocab_size * config.dim + feed_forward_flops(config)
    assert counted(config) == pytest.approx(mixer_flops(config) + without)
    assert mixer_flops(make_config()) == 0


@EACH
def test_equal_flops_are_equal_to_half_a_unit_per_layer(make, name):
    config = make(name)
    dense = dense_like(config, "flops")
    assert dense.moe_layer_ids == dense.peer_layer_ids == ()
    per_unit = 2 * (2 if config.style == "gpt2" else 3) * config.dim * config.num_layers
    assert abs(counted(dense) - counted(config)) <= per_unit / 2
    assert dense_like(config, "parameters").hidden_dim > dense.hidden_dim


@EACH
def test_equal_parameters_are_equal_to_half_a_unit_per_layer(make, name):
    config = make(name)
    dense = dense_like(config, "parameters")
    totals = [sum(each.numel() for each in Decoder(one).parameters()) for one in (dense, config)]
    per_unit = (2 if config.style == "gpt2" else 3) * config.dim * config.num_layers
    assert abs(totals[0] - totals[1]) <= per_unit / 2
    assert parameter_counts(dense).active == parameter_counts(dense).total == totals[0]
    assert (dense.mamba, dense.mamba_layers) == (config.mamba, config.mamba_layers)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_zero_computation_experts_count_with_the_share_that_balance_gives_them(make, weight):
    zero = ZeroExperts(zero=1, copy=1, constant=1, weight=weight)
    config = make("moe everywhere", zero_experts=zero, router=RoundRobin(k=7) if weight == 1 else TopK(k=2))
    D, F = config.dim, 16
    # of 7 choices 4 compute: with weight 1 each gets a seventh, with 1/2 those that compute 1/10 and the others 2/10
    computing = 7 * 4 / 7 if weight == 1 else 2 * 4 / 10
    router = 0 if weight == 1 else 2 * 7 * D
    per_layer = 6 * D * F * (computing + 1) + 2 * D + 6 * D + router
    assert feed_forward_flops(replace(config, moe=replace(config.moe))) == pytest.approx(
        3 * per_layer + (3 * 2 * 7 * D if weight == 1 else 0)
    )
    if weight == 1:  # every token takes each of the seven, so the balance is exact
        assert counted(config) - mixing(config) == pytest.approx(feed_forward_flops(config))
    counts = parameter_counts(config)
    assert counts.total == sum(each.numel() for each in Decoder(config).parameters())
    assert counts.zero == 3 * 3 * D


def test_demo_sized_models_are_a_percent_apart():
    from equipoise.train.recipes import recipe

    for name in ("demo", "base", "tiny_peer", "tiny_zero_experts"):
        config = recipe(name).model
        dense = dense_like(config, "flops")
        assert feed_forward_flops(dense) == pytest.approx(feed_forward_flops(config), rel=0.01)
        dense = dense_like(config, "parameters")
        assert parameter_counts(dense).total == pytest.approx(parameter_counts(config).total, rel=0.01)


def test_it_is_a_configuration_like_any_other(make):
    dense = dense_like(make("moe everywhere"), "flops")
    assert DecoderConfig.from_json(dense.to_json()) == dense


def test_what_makes_no_sense_is_refused(make):
    with pytest.raises(ValueError, match=re.escape("equal: expected 'flops' or 'parameters', got 'size'. Compare")):
        dense_like(make("peer"), "size")
    dense = dense_like(make("peer"), "flops")
    with pytest.raises(ValueError, match="config: expected a model with MoE or PEER layers, got a dense one"):
        dense_like(dense, "flops")
