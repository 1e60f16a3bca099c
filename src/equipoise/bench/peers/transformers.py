"""transformers' MoE block with each of its experts implementations: github.com/huggingface/transformers.

`src/transformers/integrations/moe.py` has them: a loop over experts ("eager"), one grouped product, and one that copies
an expert's weights for each assignment ("batched_mm", which transformers takes for decoding).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from equipoise.bench.problem import Candidate, Layer, LeftOutError, Problem, Shape, grad_of

MAX_COPIED_BYTES = 2 * 2**30  # a variant that copies more weights than this per call is left out


def transformers_block(problem: Problem, implementation: str) -> Layer:
    """transformers' Qwen3-MoE block, router included.

    Its experts are Mixtral's; its router casts the combine weights to the model's dtype, where Mixtral's leaves them
    in fp32 and makes the weighted sum of bf16 outputs the slower for it.
    """
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    shape = problem.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.dim,
        moe_intermediate_size=shape.hidden_dim,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        hidden_act="silu",
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config)
    block.gate.weight = nn.Parameter(problem.router_ED)
    block.experts.gate_up_proj = nn.Parameter(problem.up_EHD)
    block.experts.down_proj = nn.Parameter(problem.down_EDF)
    weights = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    return Layer(block, lambda x_TD: block(x_TD[None])[0], lambda: tuple(grad_of(weight) for weight in weights))


def needs_transformers(shape: Shape, num_tokens: int, dtype: torch.dtype) -> None:
    """Raise LeftOutError when the package is not there or too old."""
    try:
        from transformers import __version__ as version
    except ImportError:
        raise LeftOutError("transformers is not installed; pip install 'equipoise[bench]'") from None
    if int(version.split(".")[0]) < 5:
        raise LeftOutError(f"expected transformers 5 or newer, got {version}; pip install 'equipoise[bench]'")


def needs_memory_for_copies(shape: Shape, num_tokens: int, dtype: torch.dtype) -> None:
    """The same for an implementation that copies an expert's weights for each assignment."""
    needs_transformers(shape, num_tokens, dtype)
    copied = num_tokens * shape.top_k * 2 * shape.dim * shape.hidden_dim * dtype.itemsize
    if copied > MAX_COPIED_BYTES:
        raise LeftOutError(
            f"it copies weights for each assignment, {copied / 2**30:.0f} GiB with {num_tokens} {shape.name} tokens"
        )


VARIANTS = tuple(
    Candidate(f"transformers {name}", "moe", partial(transformers_block, implementation=name), check)
    for name, check in (
        ("eager", needs_transformers),
        ("grouped_mm", needs_transformers),
        ("batched_mm", needs_memory_for_copies),
    )
)
