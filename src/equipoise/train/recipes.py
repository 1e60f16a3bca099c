"""Recipes: functions that return a frozen `TrainConfig`. The one table of their names is at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from equipoise.layer import Peer, ZeroExperts
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.mamba import Mamba
from equipoise.routing import HighThenLow, QuantileBalance, SwitchLoss, TopK, ZLoss
from equipoise.train.config import DataConfig, OptimConfig, TrainConfig


def demo() -> TrainConfig:
    """4 layers of 16 experts, top-2, on the embedded corpus: about four minutes on two cores.

    Balanced by the Switch loss, strong at first and light later; a quantile balancer stands by for repairs. No z-loss:
    it would undo the demonstration's fault by itself within a few steps, at this size and learning rate (docs/log.md).
    """
    return TrainConfig(
        name="demo",
        model=DecoderConfig(
            vocab_size=2048,
            dim=192,
            num_layers=4,
            num_heads=6,
            num_kv_heads=2,
            hidden_dim=512,
            max_seq_len=256,
            moe=MoEConfig(
                num_experts=16,
                hidden_dim=256,
                router=TopK(k=2),
                balance=(
                    SwitchLoss(coef=HighThenLow(0.1, 0.02, hold=120, anneal=120)),
                    QuantileBalance(on_demand=True),
                ),
            ),
        ),
        data=DataConfig(vocab_size=2048, seq_len=128),
        optim=OptimConfig(lr=2e-3, warmup=50),
        steps=400,
        batch_size=32,
        bf16=False,  # so small a model is faster in fp32 on a CPU
        eval_every=100,
        eval_batches=8,
        checkpoint_every=100,
        watch_every=5,
        recover=True,
    )


def tiny() -> TrainConfig:
    """2 layers of 8 experts on a small vocabulary: seconds. For trying things out and for tests."""
    return TrainConfig(
        name="tiny",
        model=DecoderConfig(
            vocab_size=512,
            dim=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            hidden_dim=128,
            max_seq_len=128,
            moe=MoEConfig(
                num_experts=8,
                hidden_dim=64,
                balance=(SwitchLoss(coef=0.1), QuantileBalance(on_demand=True)),
            ),
        ),
        data=DataConfig(vocab_size=512, seq_len=64),
        optim=OptimConfig(lr=3e-3, warmup=10),
        steps=120,
        batch_size=16,
        bf16=False,
        eval_every=40,
        eval_batches=4,
        checkpoint_every=40,
        watch_every=5,
    )


def tiny_two_experts() -> TrainConfig:
    """2 layers of 2 experts, top-1, on two domains: under a minute. Shows whether the router divides them.

    At top-1 the probability multiplies the expert's output as it is: renormalised it would be 1, and the router would
    learn nothing. The vocabulary is large enough for tokens that only one domain has; with 512, letters and syllables
    that both share, routers hardly tell the domains apart. Nor do they when the balancing loss is ten times as strong.
    """
    return TrainConfig(
        name="tiny_two_experts",
        model=DecoderConfig(
            vocab_size=2048,
            dim=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            hidden_dim=128,
            max_seq_len=128,
            moe=MoEConfig(num_experts=2, hidden_dim=128, router=TopK(k=1), balance=(SwitchLoss(coef=0.01),)),
        ),
        data=DataConfig(domains=("python", "scripture"), vocab_size=2048, seq_len=64),
        optim=OptimConfig(lr=3e-3, warmup=10),
        steps=200,
        batch_size=16,
        bf16=False,
        eval_every=50,
        eval_batches=32,
        checkpoint_every=100,
        watch_every=5,
        specialisation=True,
    )


def tiny_scmoe() -> TrainConfig:
    """4 layers, every second one with 8 experts, shortcut-connected (pos2): one routed and one shared expert per token.

    What a token computes is what it does in the same model without shortcut, with two routed experts and none shared;
    `python -m benchmarks.scmoe` compares the two.
    """
    like = tiny()
    assert like.model.moe is not None
    moe = replace(like.model.moe, router=TopK(k=1), shared_experts=1, shortcut="pos2")
    return replace(like, name="tiny_scmoe", model=replace(like.model, num_layers=4, moe=moe, moe_layers=(1, 3)))


def tiny_peer() -> TrainConfig:
    """`tiny` with 1024 single-neuron experts (PEER) in each layer, 32 of them per token, in place of the MoE."""
    like = tiny()
    peer = Peer(num_experts=1024, heads=4, k=8, key_dim=16)
    return replace(like, name="tiny_peer", model=replace(like.model, moe=None, peer=peer))


def tiny_mamba() -> TrainConfig:
    """`tiny` with Mamba in place of attention: Mamba and MoE layers alternate (MoE-Mamba, arXiv 2401.04081)."""
    like = tiny()
    return replace(like, name="tiny_mamba", model=replace(like.model, mamba=Mamba()))


def tiny_zero_experts() -> TrainConfig:
    """`tiny` with 4 zero-computation experts beside the 8 of each layer (MoE++), which get 4/3 of the others' load.

    Without the balancer that stands by in `tiny`: it would even out what is to differ.
    """
    like = tiny()
    assert like.model.moe is not None
    zero = ZeroExperts(zero=1, copy=1, constant=2, weight=0.75)
    moe = replace(like.model.moe, balance=(SwitchLoss(coef=0.1),), zero_experts=zero)
    return replace(like, name="tiny_zero_experts", model=replace(like.model, moe=moe))


def base() -> TrainConfig:
    """8 layers, every second one with 32 fine-grained experts, top-4, and a shared expert: days on two cores.

    Global-batch balance with a strong start: coefficient 0.1 for the first 1000 steps, then down to 0.001.
    """
    return TrainConfig(
        name="base",
        model=DecoderConfig(
            vocab_size=16384,
            dim=512,
            num_layers=8,
            num_heads=8,
            num_kv_heads=4,
            hidden_dim=1536,
            max_seq_len=1024,
            moe=MoEConfig(
                num_experts=32,
                hidden_dim=384,
                router=TopK(k=4),
                shared_experts=1,
                balance=(
                    SwitchLoss(coef=HighThenLow(0.1, 0.001, hold=1000, anneal=1000), scope="global"),
                    ZLoss(coef=0.001),
                    QuantileBalance(on_demand=True),
                ),
            ),
            moe_layers=(1, 3, 5, 7),
        ),
        data=DataConfig(vocab_size=16384, seq_len=512),
        optim=OptimConfig(lr=6e-4, warmup=300),
        steps=10_000,
        batch_size=32,
        micro_batch_size=8,
        eval_every=500,
        checkpoint_every=500,
        watch_every=20,
        recover=True,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "tiny": tiny,
    "tiny_two_experts": tiny_two_experts,
    "tiny_scmoe": tiny_scmoe,
    "tiny_peer": tiny_peer,
    "tiny_mamba": tiny_mamba,
    "tiny_zero_experts": tiny_zero_experts,
    "base": base,
}


def recipe(name: str) -> TrainConfig:
    """The recipe of that name. Raises ValueError with the known ones."""
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}; see `equipoise train --help`")
    return RECIPES[name]()
