"""The optimizer of a run, and its learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from equipoise.train.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Linear from 0 over the warm-up, then half a cosine down to min_lr_ratio of the top at total_steps.

    step counts from 1: the first step already moves.
    """
    if step <= config.warmup:
        return config.lr * step / config.warmup
    done = min((step - config.warmup) / max(total_steps - config.warmup, 1), 1.0)
    floor = config.lr * config.min_lr_ratio
    return floor + (config.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * done))


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is for this parameter of a model: the matrices of attention and experts alone.

    Not norms and embeddings, as usual; not routers, whose logits decay would pull towards an even, undecided routing;
    not the decay rates of a state space, which it would pull towards 1.
    """
    return parameter.dim() >= 2 and "embed" not in name and ".router." not in name and not name.endswith(".A_log")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters, with weight decay on those that `decays` names."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if decays(name, parameter) else spared).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))
