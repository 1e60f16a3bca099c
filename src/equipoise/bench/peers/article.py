"""The layer as articles write it: a Python loop over experts with a capacity, in one file and without a library.

Experts are GELU networks of two matrices; here they are 1.5 times as wide as ours, so that a token meets as much
arithmetic. What such layers get wrong, and this one as well, because its readers get it so:

- The K best probabilities are normalised, and the output is weighted by those that are not: it is smaller than meant.
- The capacity is rounded down. With few tokens it is 0, and a decode step drops every token.
- Who is over capacity is drawn at random, in inference too, and the count of the dropped comes out as zero or less.
- Experts without a token get no gradient at all instead of zeros, and each expert costs a wait for the host on a GPU.

So it is compared with a plain twin of its own, and only where nothing is dropped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from equipoise.bench.problem import Candidate, Layer, LeftOutError, Problem, Shape, grad_of

FACTOR = 1.5
TEMPERATURE = 0.3


class ArticleMoE(nn.Module):
    """x (B, S, D) -> (B, S, D). num_dropped: assignments that the last forward dropped, which the article miscounts."""

    def __init__(self, router_ED: Tensor, weights: list[tuple[Tensor, Tensor]], top_k: int) -> None:
        super().__init__()
        self.top_k, self.num_dropped = top_k, 0
        self.router = nn.Parameter(router_ED)
        self.up = nn.ParameterList([up for up, _ in weights])
        self.down = nn.ParameterList([down for _, down in weights])

    def forward(self, x_BSD: Tensor) -> Tensor:
        """One expert after the other, each on the tokens that chose it, as many as fit."""
        probs_BSE = (fn.linear(x_BSD, self.router) / TEMPERATURE).softmax(-1)
        ids_BSK = probs_BSE.topk(self.top_k, dim=-1).indices
        num_tokens = x_BSD.shape[0] * x_BSD.shape[1]
        capacity = int(num_tokens * self.top_k / len(self.up) * FACTOR)
        y_BSD, self.num_dropped = torch.zeros_like(x_BSD), 0
        for expert, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            chosen = (ids_BSK == expert).any(dim=-1).nonzero()
            if len(chosen) > capacity:
                self.num_dropped += len(chosen) - capacity
                chosen = chosen[torch.randperm(len(chosen))[:capacity]]
            if len(chosen) == 0:
                continue
            rows, places = chosen.unbind(1)
            out = fn.linear(fn.gelu(fn.linear(x_BSD[rows, places], up)), down)
            y_BSD[rows, places] += out * probs_BSE[rows, places, expert, None]
        return y_BSD


def article_weights(problem: Problem) -> list[tuple[Tensor, Tensor]]:
    """(1.5 F, D) and (D, 1.5 F) of each expert: rows of the problem's own, repeated."""
    wide = 3 * problem.shape.hidden_dim // 2
    more = wide - problem.shape.hidden_dim
    downs = torch.cat([problem.down_EDF, problem.down_EDF[..., :more]], dim=-1)
    return [(up[:wide].clone(), down.clone()) for up, down in zip(problem.up_EHD, downs, strict=True)]


def article_moe(problem: Problem) -> Layer:
    """As it is written."""
    module = ArticleMoE(problem.router_ED, article_weights(problem), problem.shape.top_k)
    return Layer(module, lambda x_TD: module(x_TD[None])[0], lambda: (grad_of(module.router), *_stacked(module)))


def article_twin(problem: Problem) -> Layer:
    """The same without a capacity: every expert on every token, weighted by 0 where it was not chosen."""
    module = ArticleMoE(problem.router_ED, article_weights(problem), problem.shape.top_k)

    def forward(x_TD: Tensor) -> Tensor:
        probs_TE = (x_TD @ module.router.t() / TEMPERATURE).softmax(-1)
        chosen_TE = torch.zeros_like(probs_TE).scatter(1, probs_TE.topk(module.top_k, dim=-1).indices, 1.0)
        y_TD = torch.zeros_like(x_TD)
        for expert, (up, down) in enumerate(zip(module.up, module.down, strict=True)):
            y_TD = y_TD + fn.gelu(x_TD @ up.t()) @ down.t() * (probs_TE * chosen_TE)[:, expert, None]
        return y_TD

    return Layer(module, forward, lambda: (grad_of(module.router), *_stacked(module)))


def _stacked(module: ArticleMoE) -> tuple[Tensor, Tensor]:
    ups, downs = ([grad_of(weight) for weight in weights] for weights in (module.up, module.down))
    return torch.stack(ups), torch.stack(downs)


def drops_nothing(shape: Shape, num_tokens: int, dtype: torch.dtype) -> None:
    """Raise LeftOutError where chance alone would fill its capacity."""
    mean = num_tokens * shape.top_k / shape.num_experts
    capacity = int(mean * FACTOR)
    if capacity < mean + 6 * mean**0.5:
        raise LeftOutError(f"with {num_tokens} tokens its capacity is {capacity} per expert, and it drops some of them")


VARIANTS = (Candidate("article's loop", "article", article_moe, drops_nothing),)
