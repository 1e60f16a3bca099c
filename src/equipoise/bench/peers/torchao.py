"""torchao's weight-only quantisation of single experts as linear layers: github.com/pytorch/ao.

It quantises `nn.Linear`, not stacked experts: each expert is two of them here, and a loop takes those that are chosen.
int8 with one scale per output channel. For decoding.
"""

from __future__ import annotations

import warnings
from importlib import import_module

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from equipoise.bench.problem import Candidate, Layer, LeftOutError, Problem, Shape

MAX_TOKENS = 64


def torchao_int8(problem: Problem) -> Layer:
    """A loop over the busy experts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = import_module("torchao.quantization")

        module = nn.ModuleList()
        for up_HD, down_DF in zip(problem.up_EHD, problem.down_EDF, strict=True):
            expert = nn.ModuleList([_linear(up_HD), _linear(down_DF)])
            quantization.quantize_(expert, quantization.Int8WeightOnlyConfig())
            module.append(expert)
    router_ED = problem.router_ED

    def forward(x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = fn.linear(x_TD.float(), router_ED.float()).softmax(-1).topk(problem.shape.top_k, dim=-1)
        weights_TK = (weights_TK / weights_TK.sum(-1, keepdim=True)).to(x_TD.dtype)
        y_TD = torch.zeros_like(x_TD)
        for expert in sorted(set(ids_TK.flatten().tolist())):
            tokens, slots = (ids_TK == expert).nonzero(as_tuple=True)
            up, down = module[expert]
            gate, value = up(x_TD[tokens]).chunk(2, dim=-1)
            y_TD.index_add_(0, tokens, down(fn.silu(gate) * value) * weights_TK[tokens, slots, None])
        return y_TD

    return Layer(module, forward, tuple)


def _linear(weight_OI: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    linear.weight = nn.Parameter(weight_OI.clone(), requires_grad=False)
    return linear


def needs_torchao(shape: Shape, num_tokens: int, dtype: torch.dtype) -> None:
    """Raise LeftOutError where it is not there, or for more tokens than it is measured with."""
    try:
        import_module("torchao")
    except ImportError:
        raise LeftOutError("torchao is not installed; pip install torchao") from None
    if num_tokens > MAX_TOKENS:
        raise LeftOutError(f"a loop over quantised linear layers is for decoding, up to {MAX_TOKENS} tokens")


VARIANTS = (Candidate("torchao int8, weights only", "int8", torchao_int8, needs_torchao, trains=False),)
