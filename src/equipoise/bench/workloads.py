"""What `bench monitor` watches: training steps and decoding, of a recipe's model, a layer and a model of transformers.

Random weights and tokens: what watching costs does not depend on them. It times nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from equipoise.bench.problem import LeftOutError, Shape
from equipoise.layer import MoE
from equipoise.models.decoder import Decoder, cross_entropy_sum
from equipoise.models.generate import generate
from equipoise.routing import TopK
from equipoise.train.config import TrainConfig
from equipoise.train.optim import build_optimizer


@dataclass(frozen=True, eq=False)
class Workload:
    """step: one step of the model, on the same random input each time.

    after, before: modules around whose forward hooks, or pre-hooks, the watch works: where its time is taken.
    """

    name: str
    model: nn.Module
    step: Callable[[], object]
    after: tuple[nn.Module, ...] = ()
    before: tuple[nn.Module, ...] = ()


def recipe_workload(config: TrainConfig) -> Workload:
    """Forward, backward, clipping and optimizer of a recipe's model on random tokens."""
    model = Decoder(config.model)
    optimizer = build_optimizer(model, config.optim)
    tokens_BS = torch.randint(config.model.vocab_size, (config.batch_size, config.data.seq_len + 1))
    inputs_BS, targets_BS = tokens_BS[:, :-1], tokens_BS[:, 1:]

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.bf16):
            loss = cross_entropy_sum(model(inputs_BS), targets_BS)[0] / targets_BS.numel()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Workload(f"{config.name} recipe, {inputs_BS.numel()} tokens", model, step, after=_taps(model))


def decode_workload(config: TrainConfig, sequences: int, new: int) -> Workload:
    """So many sequences of a recipe's model, continued by `new` tokens each, greedily: all that is one step."""
    model = Decoder(config.model).eval()
    prompt_BS = torch.randint(config.model.vocab_size, (sequences, 8))

    def step() -> None:
        generate(model, prompt_BS, new, temperature=0)

    return Workload(f"{config.name} recipe, decoding {new} x {sequences} tokens", model, step, after=_taps(model))


def layer_workload(shape: Shape, num_tokens: int) -> Workload:
    """Forward and backward of one MoE layer in bf16."""
    layer = MoE(shape.dim, shape.hidden_dim, shape.num_experts, router=TopK(k=shape.top_k)).to(torch.bfloat16)
    model = nn.Sequential(layer)
    x_TD = torch.randn(num_tokens, shape.dim, dtype=torch.bfloat16, requires_grad=True)
    grad_TD = torch.randn_like(x_TD)

    def step() -> None:
        torch.autograd.backward(model(x_TD), grad_TD)
        model.zero_grad(set_to_none=True)
        x_TD.grad = None

    return Workload(f"{shape.name} layer, {num_tokens} tokens", model, step, after=_taps(model))


def transformers_workloads(shape: Shape, num_layers: int, batch: tuple[int, int], new: int) -> list[Workload]:
    """A Mixtral: a training step with a padded batch of (sequences, tokens), and `new` tokens decoded from it.

    Raises LeftOutError without transformers.
    """
    try:
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError:
        raise LeftOutError("transformers: not installed; pip install 'equipoise[bench]'") from None
    config = MixtralConfig(
        vocab_size=4096, hidden_size=shape.dim, intermediate_size=shape.hidden_dim, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k, max_position_embeddings=2048, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    tokens_BS = torch.randint(3, config.vocab_size, batch)
    mask_BS = torch.ones_like(tokens_BS)
    mask_BS[0, : batch[1] // 4] = 0

    def train() -> None:
        loss = model(input_ids=tokens_BS, attention_mask=mask_BS, labels=tokens_BS, use_cache=False).loss
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    generator: Any = model

    def decode() -> None:
        generator.generate(tokens_BS[:, :8], attention_mask=mask_BS[:, -8:], max_new_tokens=new, do_sample=False)

    experts = [module for name, module in model.named_modules() if name.endswith("experts")]
    before = (model.model, *experts)  # the mask is read once at the decoder
    named = f"transformers' Mixtral, {num_layers} x {shape.num_experts} experts"
    return [
        Workload(f"{named}, training, {tokens_BS.numel()} tokens", model, train, before=before),
        Workload(f"{named}, decoding {new} x {batch[0]} tokens", model, decode, before=before),
    ]


def _taps(model: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(module.tap for module in model.modules() if isinstance(module, MoE))
