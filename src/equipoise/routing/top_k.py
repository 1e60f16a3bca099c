"""Token-choice routing: each token takes its k best experts.

Covers the field's variants by options: softmax or sigmoid scores, weights before or after the selection, group
limits, temperature, jitter, a selection bias from a balancer. The bias changes who is selected, never the weights.
Formulas: Switch (arXiv 2101.03961), Mixtral, DeepSeek-V3 (arXiv 2412.19437 section 2.1.2; the reference is
deepseek-ai/DeepSeek-V3:inference/model.py).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from equipoise.ops.router_linear import router_linear
from equipoise.routing.router import Init, Router, Traits, check_k, init_linear, normalized
from equipoise.types import Preferences, RoutingDecision

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "score": get_args(Score),
    "order": ("pre", "post"),
    "group_score": ("top2", "max"),
    "bias_on": (None, "logits", "scores"),
    "init": get_args(Init),
}


@dataclass(frozen=True)
class TopK:
    """Configuration of a top-k router.

    k: experts per token, K.
    score: how logits become scores: "softmax" over all experts, "sigmoid", or "sqrtsoftplus" = sqrt(softplus(z)).
    order: "pre" scores all experts and then selects; "post" selects and then takes the softmax over the selected
        logits (Mixtral). "post" equals "pre" with renormalize=True for softmax.
    renormalize: divide the selected weights by their sum. None means True for k > 1. Refused for k = 1: the weight
        would be the constant 1, and the router would get no gradient from the task. "detached" divides by the sum as
        a constant: the same weights, with a gradient that also says how much the whole is to count (MoA, arXiv
        2210.05144 equation 8); it works for k = 1.
    scale: the weights are multiplied with it at the end (DeepSeek-V3: 2.5).
    temperature, eval_temperature: weights are made of z / temperature; the selection never depends on it. A
        different eval_temperature (None: the same) changes the outputs the model was trained for.
    jitter: in training the router's input is multiplied with U(1 - jitter, 1 + jitter).
    num_groups, top_groups, group_score: experts are split into num_groups groups of neighbours, and a token may only
        use its top_groups best ones, by the sum of a group's two best selection scores ("top2") or its best ("max").
    bias_on: what a balancer's bias is added to for the selection: "logits" or "scores". None is "logits" for softmax
        without groups, else "scores". Softmax scores of all but a few experts crowd near zero, below any step of a
        bias, and a saturated router's more so; among logits a bias keeps each token's order of the other experts.
    linear_bias: a learned bias on the logits (gpt-oss); no balancer's.
    init_std: standard deviation of the weight's initial values; None takes the model's. init: "normal", "truncated" at
        two standard deviations, or "orthogonal" rows of length 1, whatever init_std.
    """

    k: int = 2
    score: Score = "softmax"
    order: Literal["pre", "post"] = "pre"
    renormalize: bool | Literal["detached"] | None = None
    scale: float = 1.0
    temperature: float = 1.0
    eval_temperature: float | None = None
    jitter: float = 0.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["top2", "max"] = "top2"
    bias_on: Literal["logits", "scores"] | None = None
    init_std: float | None = None
    init: Init = "normal"
    linear_bias: bool = False

    def __post_init__(self) -> None:
        check_k("TopK", self.k)
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                expected = ", ".join(str(choice) for choice in known)
                raise ValueError(f"TopK.{name}: expected one of {expected}, got {getattr(self, name)!r}")
        for name, value in (("temperature", self.temperature), ("eval_temperature", self.eval_temperature)):
            if value is not None and value <= 0:
                raise ValueError(f"TopK.{name}: expected more than 0, got {value}")
        for name, value in (("scale", self.scale), ("init_std", self.init_std)):
            if value is not None and not value > 0:
                raise ValueError(f"TopK.{name}: expected more than 0, got {value}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"TopK.jitter: expected a value in [0, 1), got {self.jitter}")
        self._refuse_foot_guns()

    def _refuse_foot_guns(self) -> None:
        """Combinations that are well-formed and wrong."""
        if self.order == "post" and self.score != "softmax":
            raise ValueError(f'TopK.order: "post" is a softmax over the selected logits, got score={self.score!r}')
        if self.renormalize not in (None, True, False, "detached") or (
            self.renormalize == "detached" and self.order == "post"
        ):
            raise ValueError(
                f'TopK.renormalize: expected None, True, False, or "detached" with order="pre", got '
                f"{self.renormalize!r} with order={self.order!r}"
            )
        if self.k == 1 and (self.renormalize is True or self.order == "post"):
            raise ValueError(
                f"TopK: k=1 with renormalize={self.renormalize}, order={self.order!r} makes every weight the constant "
                '1, so the router gets no gradient from the task; use renormalize=False and order="pre", or k >= 2'
            )
        if self.bias_on == "logits" and self.num_groups > 1:
            raise ValueError(
                f'TopK.bias_on: "logits" with num_groups={self.num_groups}: groups are compared by sums of scores; use '
                'bias_on="scores", or num_groups=1'
            )
        if self.eval_temperature not in (None, self.temperature):
            warnings.warn(
                f"TopK: eval_temperature={self.eval_temperature} differs from temperature={self.temperature}. It does "
                "not change which experts are chosen, only scales their outputs away from what was trained; "
                "use the same value",
                UserWarning,
                stacklevel=4,
            )

    def check(self, num_experts: int) -> None:
        """Raise ValueError when this router can't work with num_experts."""
        check_k("TopK", self.k, num_experts)
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise ValueError(
                f"TopK.num_groups: expected a divisor of num_experts = {num_experts}, got {self.num_groups}"
            )
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"TopK.top_groups: expected 1 to num_groups = {self.num_groups}, got {self.top_groups}")
        reachable = self.top_groups * (num_experts // self.num_groups)
        if reachable < self.k:
            raise ValueError(
                f"TopK.top_groups: {self.top_groups} of {self.num_groups} groups hold {reachable} experts, fewer than "
                f"k = {self.k}; raise top_groups or lower num_groups"
            )

    def build(self, dim: int, num_experts: int) -> TopKRouter:
        """The router module for inputs of size dim."""
        return TopKRouter(self, dim, num_experts)

    @property
    def traits(self) -> Traits:
        """Causal, and everything else that token choice can promise."""
        return Traits(weights_sum_to=self.scale if self.order == "post" or self.renormalizes else None)

    @property
    def bias_is_on_logits(self) -> bool:
        """What `bias_on` comes to."""
        if self.bias_on is None:
            return self.score == "softmax" and self.num_groups == 1
        return self.bias_on == "logits"

    @property
    def renormalizes(self) -> bool:
        """What `renormalize` comes to."""
        return self.k > 1 if self.renormalize is None else bool(self.renormalize)


def scores_of(logits_TE: Tensor, score: Score) -> Tensor:
    """Scores in the logits' dtype; non-negative."""
    if score == "softmax":
        return logits_TE.softmax(-1)
    if score == "sigmoid":
        return logits_TE.sigmoid()
    return fn.softplus(logits_TE).clamp_min(torch.finfo(logits_TE.dtype).tiny).sqrt()  # sqrt has no derivative at 0


def limit_to_groups(scores_TE: Tensor, num_groups: int, top_groups: int, group_score: str) -> Tensor:
    """scores_TE with -inf for experts outside each token's best groups.

    -inf and not 0: a bias can push scores below zero, and a masked 0 would then win
    (huggingface/transformers#45440).
    """
    T, E = scores_TE.shape
    grouped_TGe = scores_TE.view(T, num_groups, E // num_groups)
    if group_score == "top2":
        worth_TG = grouped_TGe.topk(min(2, E // num_groups), dim=-1).values.sum(-1)
    else:
        worth_TG = grouped_TGe.amax(-1)
    allowed_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter(1, worth_TG.topk(top_groups).indices, True)
    return grouped_TGe.masked_fill(~allowed_TG.unsqueeze(-1), float("-inf")).view(T, E)


class TopKRouter(Router):
    """The linear router of `TopK`: weight (E, D), perhaps linear_bias (E,), in the model's dtype; its maths is fp32."""

    weight: Tensor

    def __init__(self, config: TopK, dim: int, num_experts: int) -> None:
        super().__init__()
        config.check(num_experts)
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.linear_bias = nn.Parameter(torch.zeros(num_experts)) if config.linear_bias else None
        self.temperature_in_force: float | None = None  # a repair's, in place of the config's in every mode
        self.init_weights(0.02)

    def init_weights(self, std: float) -> None:
        """Draw the weight; std is the model's, used where the config names none."""
        init_linear(self.weight, std if self.config.init_std is None else self.config.init_std, self.config.init)
        if self.linear_bias is not None:
            nn.init.zeros_(self.linear_bias)

    def forward(self, x_TD: Tensor, bias_E: Tensor | None = None, token_ids_T: Tensor | None = None) -> RoutingDecision:
        """Decide. bias_E (E,) fp32 is added for the selection only; token_ids_T is not used."""
        config = self.config
        if self.training and config.jitter:
            dtype = torch.promote_types(x_TD.dtype, torch.float32)  # in bf16 a jitter of 1 % is two or three steps
            x_TD = x_TD * torch.empty_like(x_TD, dtype=dtype).uniform_(1 - config.jitter, 1 + config.jitter)
        logits_TE = router_linear(x_TD, self.weight)
        if self.linear_bias is not None:
            logits_TE = logits_TE + self.linear_bias
        scores_TE = scores_of(logits_TE, config.score)
        selection_TE = logits_TE if config.bias_is_on_logits else scores_TE
        preferences = self._preferences(logits_TE, scores_TE, self._ranking(logits_TE, selection_TE, bias_E))
        ids_TK = preferences.ranking_TE.topk(config.k, dim=-1).indices
        return RoutingDecision.from_topk(
            ids_TK,
            preferences.weights(ids_TK),
            probs_TE=scores_TE if config.score == "softmax" else normalized(scores_TE),
            logits_TE=logits_TE,
            selection_TE=selection_TE,
            preferences=preferences,
        )

    def _ranking(self, logits_TE: Tensor, selection_TE: Tensor, bias_E: Tensor | None) -> Tensor:
        """What is ranked. Without bias and groups the logits, which can't tie by underflow as probabilities do."""
        config = self.config
        grouped = config.top_groups < config.num_groups
        ranking_TE = selection_TE if grouped or bias_E is not None else logits_TE
        ranking_TE = ranking_TE.detach() if bias_E is None else ranking_TE.detach() + bias_E
        if grouped:
            ranking_TE = limit_to_groups(ranking_TE, config.num_groups, config.top_groups, config.group_score)
        return ranking_TE

    def _preferences(self, logits_TE: Tensor, scores_TE: Tensor, ranking_TE: Tensor) -> Preferences:
        """The ranking, and how weights are made: gathered, never recovered as (score + bias) - bias, which cancels."""
        config = self.config
        temperature = config.temperature
        if not self.training and config.eval_temperature is not None:
            temperature = config.eval_temperature
        if self.temperature_in_force is not None:
            temperature = self.temperature_in_force
        if temperature != 1.0:
            logits_TE = logits_TE / temperature
        detached = config.renormalize == "detached"
        if config.score == "softmax" and not detached and (config.order == "post" or config.renormalizes):
            return Preferences(ranking_TE, logits_TE, "softmax", config.scale)  # equals "sum", and can't underflow
        if temperature != 1.0:
            scores_TE = scores_of(logits_TE, config.score)
        rule: Literal["raw", "sum", "detached"] = "detached" if detached else "sum" if config.renormalizes else "raw"
        return Preferences(ranking_TE, scores_TE, rule, config.scale)
