"""What a balancing coefficient of another code base is as a coefficient of `SwitchLoss`, and the other way round.

Each scale is read from the source that is named at its entry; the tests compare gradients. It converts numbers only: it
says nothing about scope, z-loss, or sigmoid scores that a source may leave unnormalised.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

Source = Literal["megatron", "huggingface", "gshard", "megablocks", "olmo-core"]


def coef_from(source: Source, coef: float, *, k: int, num_moe_layers: int) -> float:
    """The coefficient of `SwitchLoss` whose gradient is that of `coef` in another code base.

    Our scale: each layer has its own loss, E sum_e f_e P_e with shares f that sum to 1, and the layers' losses add up.

    source: exact, with one exception each for "huggingface" and "gshard":
        "megatron": the same scale. NVIDIA/Megatron-LM:megatron/core/transformer/moe/moe_utils.py. DeepSpeed's
            `topkgating` has it too (deepspeed/moe/sharded_moe.py).
        "huggingface": f sums to k, and all layers are pooled as if they were one long batch.
            huggingface/transformers:src/transformers/models/mixtral/modular_mixtral.py. Exact if the load f is the same
            in every layer, so also for one layer. Otherwise approximate: there each layer is pushed by the mean load
            of all layers, and opposite imbalances cancel.
        "gshard": f is the share of first choices. microsoft/tutel:tutel/impls/losses.py and DeepSpeed's `top1gating`
            and `top2gating`, with the layers' losses added up. Exact for k = 1, or if first choices are spread like
            all choices. Otherwise approximate: there second choices are not balanced.
        "megablocks": the mean over layers. databricks/megablocks:megablocks/layers/moe.py.
        "olmo-core": the mean over layers. allenai/OLMo-core:src/olmo_core/nn/moe/moe.py and loss.py. It divides by all
            layers of the transformer: if some have no experts, pass the number of all. With
            scale_loss_by_num_layers=False it has the scale of "megatron".
    coef: at least 0, as it stands in that code base.
    k: experts per token. num_moe_layers: layers with experts.
    Raises ValueError for an unknown source and for numbers out of range.
    """
    return _checked(coef) * _scale(source, k, num_moe_layers)


def coef_to(target: Source, coef: float, *, k: int, num_moe_layers: int) -> float:
    """The coefficient in another code base whose gradient is that of `coef` in `SwitchLoss`: inverse of `coef_from`."""
    return _checked(coef) / _scale(target, k, num_moe_layers)


def _scale(source: Source, k: int, num_moe_layers: int) -> float:
    """Ours for theirs of 1."""
    for name, count in (("k", k), ("num_moe_layers", num_moe_layers)):
        if not (isinstance(count, int) and count >= 1):
            raise ValueError(f"{name}: expected a whole number of at least 1, got {count!r}")
    if source in ("megatron", "gshard"):
        return 1.0
    if source in ("megablocks", "olmo-core"):
        return 1 / num_moe_layers
    if source == "huggingface":
        return k / num_moe_layers
    raise ValueError(
        f"source: expected one of {', '.join(get_args(Source))}, got {source!r}; "
        "for another code base compare its loss at perfect balance, and whether layers are summed or averaged"
    )


def _checked(coef: float) -> float:
    if not 0 <= coef < math.inf:
        raise ValueError(
            f"coef: expected a finite number of at least 0, got {coef!r}; less than 0 would reward imbalance"
        )
    return coef
