"""Memory of a rank: by hand, against what autograd keeps, and how it must move when a setup is changed."""

import json
from dataclasses import replace

import pytest
import torch

from equipoise.bench.saved import saved_for_backward
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder, cross_entropy_sum
from equipoise.plan.fit import activations as act
from equipoise.plan.fit.known import KNOWN
from equipoise.plan.fit.memory import GIB, PARTS, memory
from equipoise.plan.fit.model_file import of_values
from equipoise.plan.fit.setup import BYTES, Mesh, Serving, Setup, Training
from equipoise.routing import TopK

MIXTRAL, V3 = KNOWN["mixtral-8x7b"].model, KNOWN["deepseek-v3"].model
TRAIN = Setup(work=Training(), batch=2, context=4096)


def part(model, setup, name):
    return memory(model, setup).parts[name]


# ---------------------------------------------------------------------------------------------- by hand


def weights(model, setup):
    found = memory(model, setup)
    return found.parts["dense weights"] + found.parts["expert weights"]


def test_weights_are_those_that_everybody_knows():
    bf16, fp8 = Setup(precision="bf16"), Setup(precision="fp8")
    assert weights(MIXTRAL, bf16) == 2 * 46_702_792_704  # 93.4 GB, 87.0 GiB
    assert weights(MIXTRAL, bf16) / GIB == pytest.approx(87.0, abs=0.05)
    assert weights(V3, bf16) / 1e9 == pytest.approx(1342, rel=1e-3)
    assert weights(V3, fp8) / 1e9 == pytest.approx(671, rel=5e-3)  # embedding, head and norms stay in bf16
    assert weights(KNOWN["llama-4-maverick"].model, bf16) / 1e9 == pytest.approx(801, rel=1e-3)
    assert weights(KNOWN["qwen3-235b-a22b"].model, bf16) / 1e9 == pytest.approx(470, rel=1e-3)


@pytest.mark.parametrize(("name", "size"), [("gpt-oss-20b", 12.8), ("gpt-oss-120b", 60.8)])
def test_checkpoints_of_gpt_oss_have_the_published_size(name, size):
    """GiB, arXiv 2508.10925, table 1: experts in MXFP4, the rest in bf16."""
    setup = Setup(precision="bf16", experts="mxfp4")
    assert weights(KNOWN[name].model, setup) / GIB == pytest.approx(size, rel=0.005)


def test_scales_are_counted():
    assert BYTES["int4"] * 8 == 4.5  # 18 bytes for 32 weights, as GGUF's Q4_0
    assert BYTES["mxfp4"] * 8 == 4.25
    assert BYTES["fp8"] == pytest.approx(1.000244, abs=1e-6)


def test_caches_by_hand():
    # Mixtral: 2 * 8 * 128 elements of 2 bytes in 32 layers are 128 KiB per token
    assert part(MIXTRAL, Setup(context=32768), "KV cache") == 32768 * 131_072
    # DeepSeek-V3: 512 + 64 elements in 61 layers
    assert part(V3, Setup(context=1024, batch=3), "KV cache") == 3 * 1024 * 576 * 2 * 61
    # gpt-oss-20b: 12 layers see 128 tokens, 12 all of them; 2 * 8 * 64 elements
    assert part(KNOWN["gpt-oss-20b"].model, Setup(context=8192), "KV cache") == 12 * (8192 + 128) * 1024 * 2
    # a context shorter than the window
    assert part(KNOWN["gpt-oss-20b"].model, Setup(context=100), "KV cache") == 24 * 100 * 1024 * 2


def test_adam_in_mixed_precision_takes_sixteen_bytes_per_parameter():
    found = memory(MIXTRAL, replace(TRAIN, work=Training(activations="checkpoint-layers"), batch=1, context=1))
    assert found.moment == "the optimizer"
    count = 46_702_792_704
    names = ("dense weights", "expert weights", "gradients", "optimizer")
    assert sum(found.parts[name] for name in names) == 16 * count
    again = memory(MIXTRAL, replace(TRAIN, work=Training(micro_batches=2), batch=1, context=1))
    assert sum(again.parts[name] for name in names) == 18 * count  # gradients in fp32
    plain = memory(MIXTRAL, replace(TRAIN, precision="fp32", batch=1, context=1))
    assert sum(plain.parts[name] for name in names) == 16 * count
    small = memory(MIXTRAL, replace(TRAIN, work=Training(optimizer="adamw-8bit"), batch=1, context=1))
    assert sum(small.parts[name] for name in names) == 6 * count


def test_lean_experts_keep_what_their_file_says():
    """2 T D + 4 T K F bytes in bf16 with SwiGLU, D of which is the norm's output, kept anyway."""
    setup = Setup(work=Training(), batch=1, context=1000)
    assert act.moe_kept(MIXTRAL, setup, "lean").rows == 4 * 1000 * 2 * 14336
    # naive: gathered rows 2 T K D and their tokens 8 T K; gate, activation and what is weighted, 2 T K F each
    naive = act.moe_kept(MIXTRAL, setup, "naive").rows
    assert naive == 4 * 1000 * 2 * 14336 + 1000 * 2 * (2 * 4096 + 8 + 3 * 2 * 14336)
    assert act.moe_kept(MIXTRAL, setup, "checkpoint-experts").total == 0


# ---------------------------------------------------------------------------------------------- against autograd


def decoder(**more):
    sizes = {"vocab_size": 90, "dim": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 56}
    return DecoderConfig(**(sizes | {"max_seq_len": 64} | more))


MOE = MoEConfig(num_experts=6, hidden_dim=40, router=TopK(k=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        decoder(),
        decoder(moe=MOE),
        decoder(moe=MOE, moe_layers=(1,), head_dim=10),
        decoder(moe=replace(MOE, shared_experts=2)),
        decoder(moe=MOE, qk_norm=True),
        decoder(moe=replace(MOE, checkpoint_experts=True)),
        decoder(moe=replace(MOE, backend="grouped")),
    ],
    ids=["dense", "moe", "every second", "shared", "norms", "again", "grouped"],
)
def test_layers_keep_what_autograd_keeps(config, dtype):
    model = Decoder(config).to(dtype)
    tokens_BS = torch.randint(90, (2, 64))
    kept = saved_for_backward(lambda: cross_entropy_sum(model(tokens_BS), tokens_BS)[0], model.parameters())
    mode = "lean"
    if config.moe is not None and config.moe.checkpoint_experts:
        mode = "checkpoint-experts"
    elif config.moe is not None and config.moe.backend == "grouped":
        mode = "naive"
    precision = "fp32" if dtype == torch.float32 else "bf16"
    setup = Setup(work=Training(), batch=2, context=64, precision=precision, device="cpu")
    shape = of_values(json.loads(config.to_json()), "it")
    layers = sum(act.layer_kept(shape, layer, setup, mode).total for layer in range(2))
    loss = 4 * 128 * 90  # log-probabilities
    tables = 2 * 4 * 64 * (config.dim // 4 if config.head_dim is None else config.head_dim)  # cos and sin
    expected = layers + act.head_kept(shape, setup) + loss + tables
    assert kept == pytest.approx(expected, rel=0.002)


# ---------------------------------------------------------------------------------------------- how it moves


@pytest.mark.parametrize("model", [each.model for each in KNOWN.values()], ids=lambda model: model.name)
def test_every_model_can_be_served_and_trained(model):
    for setup in (Setup(context=1024), replace(TRAIN, context=1024)):
        found = memory(model, setup)
        assert tuple(found.parts) == PARTS
        assert all(size >= 0 for size in found.parts.values())
        assert found.parts["exchange buffers"] == found.parts["imbalance headroom"] == found.max_vio == 0


def test_the_fullest_moment_depends_on_what_is_many():
    assert memory(MIXTRAL, replace(TRAIN, batch=1, context=1)).moment == "the optimizer"
    large = replace(MIXTRAL, vocab=10**6, layers=2, moe_layers=(0, 1))
    assert memory(large, replace(TRAIN, batch=16)).moment == "the loss"
    small = replace(MIXTRAL, vocab=1000)
    assert memory(small, replace(TRAIN, batch=8, device="cpu")).moment == "backward of layer 31"
    assert memory(replace(MIXTRAL, vocab=10**7), Setup(batch=64, context=64)).moment == "logits"


def test_experts_are_spread_and_the_rest_is_not():
    one, eight = (memory(MIXTRAL, Setup(mesh=Mesh(expert=n), context=64)) for n in (1, 8))
    assert eight.parts["expert weights"] * 8 == one.parts["expert weights"]
    assert eight.parts["dense weights"] == one.parts["dense weights"]
    assert eight.parts["exchange buffers"] > 0 < eight.parts["imbalance headroom"]
    assert memory(MIXTRAL, Setup(mesh=Mesh(data=8), context=64)).total == one.total


@pytest.mark.parametrize(
    ("shard", "weights", "optimizer"),
    [
        # 16 ranks, 4 of which share experts. Bytes per parameter: 2 of weights, 12 of state
        ("none", (1, 1 / 4), (1, 1 / 4)),
        ("dense", (1 / 16, 1 / 4), (1 / 16, 1 / 4)),
        ("optimizer", (1, 1 / 4), (1 / 16, 1 / 16)),
        ("all", (1 / 16, 1 / 16), (1 / 16, 1 / 16)),
    ],
)
def test_sharding_spreads_what_it_says(shard, weights, optimizer):
    found = memory(MIXTRAL, replace(TRAIN, mesh=Mesh(expert=4, data=4, shard=shard))).parts
    experts = 32 * 8 * 3 * 4096 * 14336
    dense = 46_702_792_704 - experts
    assert found["dense weights"] == pytest.approx(2 * dense * weights[0], abs=1)
    assert found["expert weights"] == pytest.approx(2 * experts * weights[1], abs=1)
    assert found["optimizer"] == pytest.approx(12 * (dense * optimizer[0] + experts * optimizer[1]), abs=1)


def test_what_keeps_less_takes_less():
    modes = ("naive", "lean", "checkpoint-experts", "checkpoint-layers")
    works = [Training(activations=mode, micro_batches=2) for mode in modes]
    sizes = [memory(MIXTRAL, replace(TRAIN, work=work)).total for work in works]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_more_of_anything_takes_more():
    for base in (Setup(context=2048, batch=2), replace(TRAIN, work=Training(micro_batches=2))):
        size = memory(MIXTRAL, base).total
        assert memory(MIXTRAL, replace(base, batch=base.batch + 1)).total > size
        assert memory(MIXTRAL, replace(base, context=base.context + 512)).total > size
    spread = replace(TRAIN, mesh=Mesh(expert=8), imbalance=0.0)
    assert part(MIXTRAL, spread, "imbalance headroom") == 0
    headroom = [part(MIXTRAL, replace(spread, imbalance=vio), "imbalance headroom") for vio in (0.5, 1.0)]
    assert headroom[1] == pytest.approx(2 * headroom[0], abs=1)
    assert memory(MIXTRAL, replace(spread, imbalance=99.0)).max_vio == 7.0  # all on one rank


def test_offload_moves_to_the_host():
    now, half = Setup(context=64), Setup(context=64, offload=0.5)
    moved = part(MIXTRAL, now, "expert weights") - part(MIXTRAL, half, "expert weights")
    assert memory(MIXTRAL, half).host == moved > 0
    state = memory(MIXTRAL, replace(TRAIN, offload_state=True))
    assert state.host == 12 * 46_702_792_704
    assert state.parts["optimizer"] == 0


@pytest.mark.parametrize(
    ("model", "make", "says"),
    [
        (
            MIXTRAL,
            lambda: Setup(mesh=Mesh(expert=3)),
            "expert: expected a divisor of the 8 experts of mixtral-8x7b, got 3",
        ),
        (MIXTRAL, lambda: Setup(mesh=Mesh(expert=16)), "expert: expected a divisor of the 8 experts"),
        (MIXTRAL, lambda: Setup(mesh=Mesh(expert=0)), "expert: expected at least 1 rank, got 0"),
        (
            MIXTRAL,
            lambda: Setup(mesh=Mesh(shard="some")),
            "shard: expected one of none, dense, optimizer, all, got 'some'",
        ),
        (MIXTRAL, lambda: Setup(batch=0), "batch: expected at least 1, got 0"),
        (MIXTRAL, lambda: Setup(precision="fp16"), "precision: expected one of fp32, bf16, fp8"),
        (MIXTRAL, lambda: replace(TRAIN, precision="int4"), "precision: expected fp32 or bf16 in training, got int4"),
        (MIXTRAL, lambda: replace(TRAIN, experts="fp8"), "experts: expected fp32 or bf16 in training, got fp8"),
        (MIXTRAL, lambda: Setup(imbalance=float("nan")), "imbalance: expected a MaxVio of at least 0, got nan"),
        (MIXTRAL, lambda: Setup(offload=1.5), "offload: expected a share of 0 to 1, got 1.5"),
        (MIXTRAL, lambda: Setup(work=Training(micro_batches=0)), "micro_batches: expected at least 1, got 0"),
        (MIXTRAL, lambda: Setup(work=Training(optimizer="lion")), "optimizer: expected one of adamw"),
        (MIXTRAL, lambda: Setup(work=Serving(step_tokens=0)), "step_tokens: expected at least 1, got 0"),
        (replace(MIXTRAL, positions=1024), lambda: Setup(context=2048), "context: expected at most 1024 tokens"),
        (
            replace(MIXTRAL, routed=None, moe_layers=(), hidden_dim=64),
            lambda: Setup(mesh=Mesh(expert=2)),
            "expert: expected 1 rank for mixtral-8x7b, which has no experts, got 2",
        ),
    ],
)
def test_what_cannot_be_is_refused(model, make, says):
    with pytest.raises(ValueError, match=r".*") as caught:
        memory(model, make())
    assert says in str(caught.value)
