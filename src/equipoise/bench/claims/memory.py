"""Claims about memory: what all experts take, what is active, what recomputing the experts saves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from equipoise.bench.claims.arms import BASE
from equipoise.bench.claims.balance import PRODUCTION
from equipoise.bench.claims.claim import Bench, Claim, Reading
from equipoise.bench.claims.statistics import Range
from equipoise.bench.saved import saved_for_backward
from equipoise.layer import MoE
from equipoise.models.decoder import Decoder, cross_entropy_sum
from equipoise.plan.fit.architecture import Architecture
from equipoise.plan.fit.known import KNOWN
from equipoise.plan.fit.parameters import parameters

THEME = "memory"


@dataclass(frozen=True)
class Held:
    """recompute: the experts in backward. whole: the model's forward, or a layer's alone."""

    recompute: bool
    whole: bool = True


def _bytes(held: Held, seed: int) -> int:
    torch.manual_seed(seed)
    assert BASE.model.moe is not None
    config = replace(BASE.model, moe=replace(BASE.model.moe, checkpoint_experts=held.recompute))
    if held.whole:
        model = Decoder(config)
        tokens_BS = torch.randint(config.vocab_size, (BASE.batch_size, BASE.data.seq_len))
        return saved_for_backward(lambda: cross_entropy_sum(model(tokens_BS), tokens_BS)[0], model.parameters())
    layer: nn.Module = MoE(config.dim, BASE.model.moe.hidden_dim, BASE.model.moe.num_experts)
    x_TD = torch.randn(BASE.batch_size * BASE.data.seq_len, config.dim, requires_grad=True)
    run = (lambda: checkpoint(layer, x_TD, use_reentrant=False)) if held.recompute else (lambda: layer(x_TD))
    return saved_for_backward(run, layer.parameters())


def less_memory(bench: Bench, held: Held) -> list[Reading]:
    """Share of the bytes held for backward that is saved, against keeping all."""
    values = []
    for seed in range(2):  # the load differs a little; the sizes hardly
        values.append(1 - _bytes(held, seed) / _bytes(replace(held, recompute=False), seed))
    return [Reading("share of what is held for backward that is saved", "", tuple(values), Range(0.2, 0.6))]


def _without_experts_but(model: Architecture, num: int) -> float:
    counts, routed = parameters(model), model.routed
    assert routed is not None
    return counts.outside_experts + counts.experts * num / routed.num


def total_over_single(bench: Bench, num: int) -> list[Reading]:
    """Parameters of a Mixtral 8x7B with so many experts, over those of the same with one."""
    model = _mixtral()
    value = _without_experts_but(model, num) / _without_experts_but(model, 1)
    return [Reading("parameters over those of one expert", "", (value,), Range(7.5, 8.5), "exact")]


def active_share(bench: Bench, num: int) -> list[Reading]:
    """Parameters that a token uses with so many experts of eight, over all."""
    model = _mixtral()
    value = 100 * _without_experts_but(model, num) / parameters(model).total
    return [Reading("active share", "%", (value,), Range(18.0, 22.0), "exact")]


def _mixtral() -> Architecture:
    return KNOWN["mixtral-8x7b"].model


CLAIMS = (
    Claim(
        name="checkpointing-experts-saves-40-percent",
        theme=THEME,
        hypothesis="Recomputing the experts in backward saves 40 % of the memory",
        where=f"{PRODUCTION}: reduced memory by checkpointing the expert forward passes",
        theirs="40 %",
        method="bytes held for backward by the model of the training claims, within half of 40 %: 20 to 60 % less",
        control_is="recomputed in neither",
        measure=less_memory,
        setup=Held(recompute=True),
        control=Held(recompute=False),
        seconds=1.0,
    ),
    Claim(
        name="checkpointing-a-layer-saves-40-percent",
        theme=THEME,
        hypothesis="The same of an MoE layer alone",
        where=f"{PRODUCTION}: the same sentence, read as of the layer",
        theirs="40 %",
        method="bytes that one layer holds for backward",
        control_is="recomputed in neither",
        measure=less_memory,
        setup=Held(recompute=True, whole=False),
        control=Held(recompute=False, whole=False),
        seconds=0.3,
    ),
    Claim(
        name="8x7b-is-eight-times-7b",
        theme=THEME,
        hypothesis="An 8x7B model takes 8 times the memory of a 7B one",
        where=f"{PRODUCTION}: 8x the memory of a 7B dense model",
        theirs="8 times",
        method="parameters of Mixtral 8x7B over the same with one expert per layer",
        control_is="two experts",
        measure=total_over_single,
        setup=8,
        control=2,
        seconds=0.0,
    ),
    Claim(
        name="20-percent-is-active",
        theme=THEME,
        hypothesis="A token uses about 20 % of an 8x7B model",
        where=f"{PRODUCTION}: only activating ~20 % of parameters",
        theirs="20 %",
        method="parameters of Mixtral 8x7B with two of eight experts over all",
        control_is="all eight experts",
        measure=active_share,
        setup=2,
        control=8,
        present=1.3,
        present_is="1.3 experts per token, which are 20 %",
        seconds=0.0,
    ),
)
