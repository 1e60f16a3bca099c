"""The MoE layers of `transformers` 5 models (and of any other that is built alike) as layers that can be watched.

An experts module is recognised by its forward, (hidden_states, top_k_index, top_k_weights), not by its class. Counted
are the indices that it really gets; nothing is selected again from logits. No import of transformers is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equipoise.monitor.adapters.padding import Arguments, RealTokens, recomputing, takes_mask
from equipoise.ops.count import accumulate, count_assignments
from equipoise.types import Routed, RoutingDecision

# What the parameters of an experts module's forward are called (transformers:integrations/moe.py, models/gpt_oss).
INDEX_NAMES = ("top_k_index", "router_indices")
WEIGHT_NAMES = ("top_k_weights", "routing_weights")
ROUTER_NAMES = ("gate", "router")
SCORE_TOLERANCE = 0.02  # of weights that sum to 1; rounding to bf16 makes 0.002
ROW_SUM_TOLERANCE = 0.02


@dataclass(frozen=True, eq=False)
class _NoPlan:
    """The experts module arranges its rows inside; nothing is dropped there."""

    expert_ids_N: Tensor
    num_experts: int

    @property
    def counts_e(self) -> Tensor:
        return count_assignments(self.expert_ids_N, self.num_experts)

    @property
    def drops(self) -> Mapping[str, Tensor]:
        return {}


class ExpertsLayer:
    """One MoE layer of somebody else's model, as an `Observable`. It holds hooks only between attach and detach.

    name: the path of the MoE block in the model. tap: called with a `Routed` of the real tokens of every forward.
    num_experts: E, from the experts' attribute or weights: experts that never get a token are experts too.
    Statistics of logits are NaN where the router does not return logits (T, E), those of probabilities where it also
    does not return these, or uses other scores than softmax and sigmoid. Counts are exact in any case.
    """

    loss_names: tuple[str, ...] = ()

    def __init__(
        self, name: str, experts: nn.Module, router: nn.Module | None = None, tokens: RealTokens | None = None
    ) -> None:
        self.name = name
        self.tap: nn.Module = nn.Identity()
        self.num_experts = num_experts(experts, name)
        self.tokens = tokens
        self._experts = experts
        self._router = router
        self._arguments = Arguments(experts)
        self._index_name, self._weight_name = _index_and_weight(self._arguments) or ("", "")
        self._scores_TE: Tensor | None = None  # from the router to the experts of the same forward
        devices = [p.device for p in experts.parameters() if p.device.type != "meta"]
        self._misfits = torch.zeros(3, dtype=torch.float64, device=devices[0] if devices else None)  # see interpret

    def attach(self) -> list[RemovableHandle]:
        """Listen to experts and router until the handles are removed."""
        handles = [self._experts.register_forward_pre_hook(self._on_experts, with_kwargs=True)]
        if self._router is not None:
            handles.append(self._router.register_forward_hook(self._on_router))
        return handles

    def _on_router(self, module: nn.Module, args: Any, output: Any) -> None:
        self._scores_TE = find_scores(output, self.num_experts)

    @torch.no_grad()
    def _on_experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scores_TE, self._scores_TE = self._scores_TE, None
        if recomputing():  # the recorder would not count it either; this spares the arithmetic
            return
        ids_TK, weights_TK = self._selection(args, kwargs)
        T = ids_TK.shape[0]
        if scores_TE is not None and scores_TE.shape[0] != T:
            scores_TE = None
        if self.tokens is not None and self.tokens.index_T is not None:
            index_T = self._real_tokens(self.tokens, ids_TK)
            ids_TK, weights_TK = ids_TK[index_T], weights_TK[index_T]
            scores_TE = scores_TE if scores_TE is None else scores_TE[index_T]
        if scores_TE is None:
            logits_TE = probs_TE = weights_TK.new_full((1, 1), torch.nan).expand(ids_TK.shape[0], self.num_experts)
        else:
            self._misfits = self._misfits.to(scores_TE.device)
            logits_TE, probs_TE = interpret(scores_TE.float(), ids_TK, weights_TK, self._misfits)
        decision = RoutingDecision.from_topk(ids_TK, weights_TK, probs_TE=probs_TE, logits_TE=logits_TE)
        self.tap(Routed(decision, _NoPlan(decision.expert_ids_N, self.num_experts), {}))

    def _selection(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """int64 (T, K) and fp32 (T, K): what the experts are called with."""
        ids_TK = self._arguments.value(self._index_name, args, kwargs)
        weights_TK = self._arguments.value(self._weight_name, args, kwargs)
        both = isinstance(ids_TK, Tensor) and isinstance(weights_TK, Tensor) and ids_TK.shape == weights_TK.shape
        if not both or ids_TK.ndim < 2 or ids_TK.is_floating_point() or ids_TK.dtype == torch.bool:
            got = " and ".join(
                str(getattr(x, "shape", None) and (x.dtype, tuple(x.shape))) for x in (ids_TK, weights_TK)
            )
            raise ValueError(
                f"{self.name}: expected integer {self._index_name} and {self._weight_name} of one shape (T, K), got "
                f"{got}; experts that are called with something else cannot be watched"
            )
        K = ids_TK.shape[-1]
        return ids_TK.detach().reshape(-1, K).long(), weights_TK.detach().reshape(-1, K).float()

    def _real_tokens(self, tokens: RealTokens, ids_TK: Tensor) -> Tensor:
        assert tokens.index_T is not None
        B, S = tokens.shape or (0, 0)
        if ids_TK.shape[0] != B * S:
            raise ValueError(
                f"{self.name}: expected {self._index_name} for the {B} x {S} = {B * S} tokens of the attention_mask, "
                f"got {tuple(ids_TK.shape)}; the mask cannot be matched with the tokens: pass none, and no padding"
            )
        return tokens.index_T.to(ids_TK.device)


# --------------------------------------------------------------------------------------------------------- finding


def experts_layers(model: nn.Module) -> dict[str, ExpertsLayer]:
    """The MoE layers of the model by the path of their block, in the model's order. Nothing is hooked yet.

    Raises ValueError for experts whose number cannot be learnt, or that are spread over ranks.
    """
    layers: dict[str, ExpertsLayer] = {}
    tokens: dict[nn.Module, RealTokens] = {}
    modules = dict(model.named_modules())
    for path, experts in modules.items():
        if _index_and_weight(Arguments(experts)) is None:
            continue
        ancestors = [(name, modules[name]) for name in _ancestors(path)]
        block, router = _block_and_router(path, ancestors)
        decoder = next((module for _, module in ancestors if takes_mask(module)), None)
        real = None if decoder is None else tokens.setdefault(decoder, RealTokens(decoder))
        name = path if block in layers else block
        layers[name] = ExpertsLayer(name, experts, router, real)
    return layers


def attach(layers: Iterable[object]) -> list[RemovableHandle]:
    """Hook those of the layers that are found by this file. Removing the handles leaves the model as it was."""
    adapted = [layer for layer in layers if isinstance(layer, ExpertsLayer)]
    tokens = dict.fromkeys(layer.tokens for layer in adapted if layer.tokens is not None)  # once per decoder, in order
    handles = [handle for real in tokens for handle in real.attach()]
    return handles + [handle for layer in adapted for handle in layer.attach()]


def num_experts(experts: nn.Module, name: str) -> int:
    """E, from the module's attribute and its stacked weights [E, ...], never from the indices seen."""
    if getattr(experts, "_is_expert_parallel", False):
        raise ValueError(
            f"{name}: expected all experts of the layer on this rank, got expert-parallel ones; "
            "watch the model without expert parallelism"
        )
    stacked = [parameter.shape[0] for parameter in experts.parameters() if parameter.ndim == 3]
    declared = getattr(experts, "num_experts", 0)
    number = max([declared if isinstance(declared, int) else 0, *stacked])
    if number < 1:
        raise ValueError(
            f"{name}: expected {type(experts).__name__} to have num_experts or stacked weights [E, ., .], got neither; "
            "set num_experts on it"
        )
    return number


def _index_and_weight(arguments: Arguments) -> tuple[str, str] | None:
    """The parameters of the indices and weights, if the forward is that of an experts module."""
    index = [name for name in INDEX_NAMES if name in arguments.names]
    weight = [name for name in WEIGHT_NAMES if name in arguments.names]
    return (index[0], weight[0]) if index and weight else None


def _ancestors(path: str) -> Iterator[str]:
    """The paths of the modules around a module, innermost first, the model ("") last."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _block_and_router(path: str, ancestors: list[tuple[str, nn.Module]]) -> tuple[str, nn.Module | None]:
    """The nearest module around the experts that has a router, with it. Wrappers may stand between them."""
    for name, module in ancestors:
        if isinstance(module, nn.ModuleList):
            break  # from here on it is a stack of layers
        for child in ROUTER_NAMES:
            router = getattr(module, child, None)
            if isinstance(router, nn.Module):
                return name, router
    return (ancestors[0][0] if ancestors else path), None


# ------------------------------------------------------------------------------------------- what the router returns


def find_scores(output: Any, num_experts: int) -> Tensor | None:
    """(T, E): the first floating tensor of the router's output with E columns, detached; None if there is none."""
    for value in output if isinstance(output, tuple | list) else (output,):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2:
            scores_TE = value.detach().reshape(-1, value.shape[-1])
            if scores_TE.shape[1] == num_experts:
                return scores_TE
    return None


def interpret(scores_TE: Tensor, ids_TK: Tensor, weights_TK: Tensor, misfits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and probabilities, both fp32 (T, E), from what a router has returned; NaN where it does not tell.

    Rows that are non-negative and sum to 1 are probabilities, and there are no logits. Otherwise they are logits, and
    their scores are softmax or sigmoid (then row-normalised), whichever explains the weights that the experts got: the
    weights of a token relative to each other, at K = 1 those of the tokens. If neither does, probabilities are NaN.
    misfits: float64 (3,), of softmax, of sigmoid, tokens: added up over all forwards, so that few tokens with nearly
        equal weights cannot turn the verdict. All is decided on the device.
    """
    softmax_TE, sigmoid_TE = scores_TE.softmax(-1), scores_TE.sigmoid()
    seen = [_misfit(s_TE.gather(1, ids_TK), weights_TK) for s_TE in (softmax_TE, sigmoid_TE)]
    T, K = ids_TK.shape
    tokens = seen[0].new_zeros(()) + (T if K > 1 else T - 1)  # the only weight of a single token tells nothing
    evidence = torch.stack([*seen, tokens.clamp_min(0)])
    accumulate(misfits, evidence.nan_to_num(0.0, 0.0, 0.0))  # a forward that went wrong proves nothing
    probs_TE = torch.where(misfits[0] <= misfits[1], softmax_TE, _rows_to_1(sigmoid_TE))
    known = misfits[:2].min() < SCORE_TOLERANCE * misfits[2]
    probs_TE = torch.where(known, probs_TE, torch.nan)
    are_probs = (scores_TE >= 0).all() & ((scores_TE.sum(-1) - 1).abs() < ROW_SUM_TOLERANCE).all()
    return torch.where(are_probs, torch.nan, scores_TE), torch.where(are_probs, scores_TE, probs_TE)


def _misfit(scores_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Scalar: how far the weights are from the scores of the same experts, summed over tokens."""
    if scores_TK.shape[-1] > 1:
        return (_rows_to_1(scores_TK) - _rows_to_1(weights_TK)).abs().sum()
    return (scores_TK / scores_TK.mean() - weights_TK / weights_TK.mean()).abs().sum()


def _rows_to_1(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
