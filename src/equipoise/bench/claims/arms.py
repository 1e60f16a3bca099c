"""The small model on which claims about training are tried: what all runs have in common, and how one differs.

Four layers of eight experts, top-2, on the embedded corpus of four domains; some 40 s a run on one core.
At a third of the steps, runs that differ in nothing that matters end 0.07 nats apart; here 0.02. Numbers found
at this size say which way an effect goes; they do not say how large it is in a model a million times as big.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from equipoise.bench.claims.claim import Arm
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.routing import SwitchLoss, TopK
from equipoise.train.config import DataConfig, OptimConfig, TrainConfig

STEPS, COEF, LR = 900, 0.01, 3e-3
VOCAB, EXPERTS, HIDDEN = 512, 8, 64
SECONDS_PER_STEP = 0.047  # of one core, what is measured at the end included

BASE = TrainConfig(
    name="claims",
    model=DecoderConfig(
        vocab_size=VOCAB,
        dim=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        hidden_dim=2 * HIDDEN,  # of a dense block: what a token computes in two experts
        max_seq_len=128,
        moe=MoEConfig(
            num_experts=EXPERTS, hidden_dim=HIDDEN, router=TopK(k=2), balance=(SwitchLoss(coef=COEF),), backend="lean"
        ),
    ),
    data=DataConfig(vocab_size=VOCAB, seq_len=64),
    optim=OptimConfig(lr=LR, warmup=30),
    steps=STEPS,
    batch_size=16,
    device="cpu",
    bf16=False,
    eval_every=0,
    eval_batches=32,
    checkpoint_every=0,
    keep_checkpoints=1,
    watch_every=10,
    co_select=0,
    interference_every=STEPS // 15,
)


def arm(label: str, *, probe: str = "plain", model: dict[str, Any] | None = None, **moe: Any) -> Arm:
    """The base with other fields of its `MoEConfig`. model: other fields of its `DecoderConfig`."""
    assert BASE.model.moe is not None
    config = replace(BASE.model, moe=replace(BASE.model.moe, **moe), **(model or {}))
    return Arm(label, replace(BASE, model=config), probe)


def dense() -> Arm:
    """One expert of two experts' size, which all tokens take with the weight 1: a dense block under another name."""
    one: dict[str, Any] = {"num_experts": 1, "hidden_dim": 2 * HIDDEN, "router": TopK(k=1), "balance": ()}
    return of(arm("dense", **one), "dense", interference_every=0)


def of(base: Arm, label: str, **run: Any) -> Arm:
    """The same with other fields of the run."""
    return replace(base, label=label, config=replace(base.config, **run))


def switch(coef: float, **options: Any) -> tuple[SwitchLoss]:
    """The Switch loss alone."""
    return (SwitchLoss(coef=coef, **options),)


BALANCED = arm("balanced (Switch loss 0.01)")
SAME_A = arm("balanced, coefficient 0.1 % larger", balance=switch(COEF * 1.001))
SAME_B = of(BALANCED, "balanced, learning rate 0.1 % larger", optim=OptimConfig(lr=LR * 1.001, warmup=30))
NOISE = ((BALANCED, SAME_A), (BALANCED, SAME_B))
UNBALANCED = arm("no balancing", balance=switch(0.0))
HALF_TRAINED = of(BALANCED, "balanced, half of the steps", steps=STEPS // 2, interference_every=STEPS // 30)
DENSE = dense()
