"""The nouns that travel between the parts of equipoise, and the protocols that parts implement.

Shape letters, everywhere, as suffixes: T tokens (padding removed), D model dim, F expert hidden dim, E experts,
e experts on this rank, K experts per token, N assignments, R rows on this rank, L MoE layers, B batch, S sequence.
A capital is a logical size, lower case the local shard. This file does not import torch at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import nan
from typing import TYPE_CHECKING, Literal, Protocol, TypeGuard, TypeVar, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Severity = Literal["info", "warning", "critical"]
ActionState = Literal["proposed", "applied", "kept", "undone", "failed"]
T = TypeVar("T")


# ---------------------------------------------------------------------------------------------- in the layer


@dataclass(frozen=True, eq=False)
class Preferences:
    """How each token ranks all experts, and what weights it would give them: to look past its first K.

    ranking_TE: fp32, without gradient: the K largest of a row are the decision; -inf marks experts it may not use.
    values_TE: fp32, with gradient: weights are made of the values of the experts that are chosen.
    rule: "raw" takes the values as they are, "sum" divides them by their sum, "detached" by their sum as a constant
    (no gradient flows through it), "softmax" takes their softmax.
    scale: the weights are multiplied with it at the end.
    """

    ranking_TE: Tensor
    values_TE: Tensor
    rule: Literal["raw", "sum", "detached", "softmax"]
    scale: float = 1.0

    def weights(self, ids_TK: Tensor) -> Tensor:
        """fp32 (T, K): the combine weights of a choice, ids_TK int64 (T, K). Carries the gradient to the router."""
        weights_TK = self.values_TE.gather(1, ids_TK)
        if self.rule == "softmax":
            weights_TK = weights_TK.softmax(-1)
        elif self.rule != "raw":
            sum_T1 = weights_TK.sum(-1, keepdim=True).clamp_min(1e-38)  # fp32's smallest
            weights_TK = weights_TK / (sum_T1.detach() if self.rule == "detached" else sum_T1)
        return weights_TK if self.scale == 1.0 else self.scale * weights_TK


@dataclass(frozen=True, eq=False)
class RoutingDecision:
    """Who goes where, with what weight: one row per (token, expert) assignment, no pair twice.

    token_ids_N: int64, the token of each assignment, in [0, T).
    expert_ids_N: int64, the logical expert of each assignment, in [0, E).
    weights_N: fp32, what the expert's output is multiplied with. Carries the gradient to the router.
    probs_TE: fp32, router probabilities, each row sums to 1 (sigmoid scores are row-normalised). For losses.
    logits_TE: fp32, router logits before score, bias and jitter of the selection. For losses and statistics.
    selection_TE: fp32, what a selection bias is added to: the logits or the scores, as the router has it.
    top_k: K when every token has exactly K assignments, stored token by token (the (T, K) fast path); else None.
    preferences: of routers in which each token ranks all experts; else None.
    noise_std_TE: fp32, of the noise that is in selection_TE and not in logits_TE; None without noise.
    """

    token_ids_N: Tensor
    expert_ids_N: Tensor
    weights_N: Tensor
    probs_TE: Tensor
    logits_TE: Tensor
    selection_TE: Tensor
    top_k: int | None = None
    preferences: Preferences | None = None
    noise_std_TE: Tensor | None = None

    @classmethod
    def from_topk(
        cls,
        ids_TK: Tensor,
        weights_TK: Tensor,
        *,
        probs_TE: Tensor,
        logits_TE: Tensor,
        selection_TE: Tensor | None = None,
        preferences: Preferences | None = None,
        noise_std_TE: Tensor | None = None,
    ) -> RoutingDecision:
        """Build the decision of a token-choice router: K experts for each of T tokens.

        ids_TK: int64 (T, K), distinct within a row. weights_TK: fp32 (T, K).
        """
        import torch

        T, K = ids_TK.shape
        return cls(
            token_ids_N=torch.arange(T * K, device=ids_TK.device).floor_divide_(K),
            expert_ids_N=ids_TK.reshape(-1),
            weights_N=weights_TK.reshape(-1),
            probs_TE=probs_TE,
            logits_TE=logits_TE,
            selection_TE=logits_TE if selection_TE is None else selection_TE,
            top_k=K,
            preferences=preferences,
            noise_std_TE=noise_std_TE,
        )

    @classmethod
    def from_mask(cls, mask_TE: Tensor, weights_TE: Tensor, *, probs_TE: Tensor, logits_TE: Tensor) -> RoutingDecision:
        """Build the decision of a router that gives tokens different numbers of experts, in token order.

        mask_TE: bool, who takes whom. weights_TE: fp32, read where the mask is set. How many assignments there are is
        known to the host only after the device has counted them: one synchronisation per forward on a GPU.
        """
        token_ids_N, expert_ids_N = mask_TE.nonzero(as_tuple=True)
        weights_N = weights_TE[token_ids_N, expert_ids_N]
        return cls(token_ids_N, expert_ids_N, weights_N, probs_TE, logits_TE, selection_TE=logits_TE)

    def with_experts(self, ids_TK: Tensor) -> RoutingDecision:
        """The same decision with other experts, weighted by the tokens' preferences for these. ids_TK: int64 (T, K).

        Raises ValueError for a decision without preferences.
        """
        if self.preferences is None:
            raise ValueError("with_experts: needs a router in which tokens rank all experts, such as TopK")
        weights_N = self.preferences.weights(ids_TK).reshape(-1)
        return replace(self, expert_ids_N=ids_TK.reshape(-1), weights_N=weights_N)

    @property
    def num_tokens(self) -> int:
        """T, the real tokens that were routed."""
        return int(self.probs_TE.shape[0])

    @property
    def num_experts(self) -> int:
        """E, the logical experts."""
        return int(self.probs_TE.shape[1])


@dataclass(frozen=True, eq=False)
class ProductDecision:
    """As `RoutingDecision`, of a router whose logits are sums of two: expert a B + b has first_TA[a] + second_TB[b].

    Experts may be so many that nobody wants all their logits; what is asked of them follows from the two parts.
    first_TA, second_TB: fp32 (T, A) and (T, B), with gradient. top_k: every token has so many experts.
    """

    token_ids_N: Tensor
    expert_ids_N: Tensor
    weights_N: Tensor
    first_TA: Tensor
    second_TB: Tensor
    top_k: int | None

    @property
    def logits_TE(self) -> Tensor:
        """(T, A B), made when it is asked for."""
        return (self.first_TA[:, :, None] + self.second_TB[:, None, :]).flatten(1)

    @property
    def probs_TE(self) -> Tensor:
        """(T, A B), the softmax over all experts, made when it is asked for."""
        return self.logits_TE.softmax(-1)

    @property
    def selection_TE(self) -> Tensor:
        """The logits: no bias moves the selection."""
        return self.logits_TE

    @property
    def num_tokens(self) -> int:
        """T, the rows that were routed."""
        return int(self.first_TA.shape[0])

    @property
    def num_experts(self) -> int:
        """E = A B."""
        return int(self.first_TA.shape[1] * self.second_TB.shape[1])


class Decision(Protocol):
    """What observers use of a decision; `RoutingDecision` says what each is."""

    @property
    def token_ids_N(self) -> Tensor: ...  # noqa: D102 - described by the class

    @property
    def expert_ids_N(self) -> Tensor: ...  # noqa: D102 - described by the class

    @property
    def weights_N(self) -> Tensor: ...  # noqa: D102 - described by the class

    @property
    def probs_TE(self) -> Tensor: ...  # noqa: D102 - described by the class

    @property
    def logits_TE(self) -> Tensor: ...  # noqa: D102 - described by the class

    @property
    def selection_TE(self) -> Tensor: ...  # noqa: D102 - described by the class

    @property
    def top_k(self) -> int | None: ...  # noqa: D102 - described by the class

    @property
    def num_tokens(self) -> int: ...  # noqa: D102 - described by the class

    @property
    def num_experts(self) -> int: ...  # noqa: D102 - described by the class


@runtime_checkable
class DispatchPlan(Protocol):
    """What `combine` needs to undo `dispatch`. Each dispatcher has its own; these two fields are public.

    counts_e: int64 (e,), rows that each local expert computes, after drops.
    drops: scalar int64 tensors by reason, those of `DROP_REASONS` and `REROUTE_REASONS`. Empty for a dispatcher that
        never drops.
    """

    @property
    def counts_e(self) -> Tensor: ...  # noqa: D102 - described by the class

    @property
    def drops(self) -> Mapping[str, Tensor]: ...  # noqa: D102 - described by the class


@dataclass(frozen=True, eq=False)
class Routed:
    """What an MoE layer shows to observers after each forward: the decision, the plan, the balancing losses.

    losses: each balancing loss before its coefficient, by name, detached scalars; empty in eval.
    spilled_T: fp32, the combine weight of each token that the stand-in takes over from experts; None where nothing is.
    """

    decision: Decision
    plan: DispatchPlan
    losses: Mapping[str, Tensor]
    spilled_T: Tensor | None = None


# Assignments lost: beyond the capacity, or beyond a hard cap that is tighter. "tokens": tokens that lost all of theirs.
DROP_REASONS = ("capacity", "hard_cap", "tokens")
# Assignments that were not lost: without room, and moved to another expert or computed by the stand-in (the shared
# expert, or a dense path); or diverted to the stand-in because a repair keeps them from their experts.
REROUTE_REASONS = ("moved", "spilled", "diverted")


class Observable(Protocol):
    """A layer that can be watched: its `tap` is called with a `Routed` in every forward, losses under `loss_names`.

    `is_observable` tells. From Python 3.12 on isinstance does not see modules within modules, as the tap is.
    """

    @property
    def tap(self) -> Module: ...  # noqa: D102 - described by the class

    @property
    def num_experts(self) -> int: ...  # noqa: D102 - described by the class

    @property
    def loss_names(self) -> tuple[str, ...]: ...  # noqa: D102 - described by the class


def is_observable(layer: object) -> TypeGuard[Observable]:
    """Whether it has all that an `Observable` has."""
    return all(hasattr(layer, name) for name in ("tap", "num_experts", "loss_names"))


@dataclass(frozen=True, eq=False)
class BatchScope:
    """What a balancing loss may know beyond the micro-batch in its hands. Passed down by the training loop.

    step: the optimizer step, for coefficients that follow a schedule.
    share: this micro-batch's share of the tokens of the global batch, in (0, 1]. Scales every balancing loss, so
        that the gradients of the micro-batches add up to the gradient of the batch.
    counts: int64 assignments of the whole global batch, (L, E) for a model, (E,) for one layer. Losses with
        scope="global" need it when the global batch is split; None means that this micro-batch is the global batch.
    """

    step: int = 0
    share: float = 1.0
    counts: Tensor | None = None

    def layer(self, index: int) -> BatchScope:
        """The scope as layer number `index` of the model's MoE layers sees it."""
        return self if self.counts is None else replace(self, counts=self.counts[index])


# ---------------------------------------------------------------------------------------------- on ranks


@dataclass(frozen=True)
class Placement:
    """Which of a layer's logical experts each rank holds. An expert on several ranks is replicated.

    slots: by rank, the logical experts in the order of that rank's slots. Each expert of 0..E-1 has a slot somewhere,
    and at most one on each rank. Ranks may hold different numbers of experts, also none.
    Raises ValueError for anything else.
    """

    slots: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        placed = {expert for rank in self.slots for expert in rank}
        if placed != set(range(len(placed))):
            raise ValueError(f"Placement.slots: expected every expert from 0 on to have a slot, got {sorted(placed)}")
        for rank, experts in enumerate(self.slots):
            if len(set(experts)) < len(experts):
                raise ValueError(
                    f"Placement.slots: expected each expert at most once on a rank, rank {rank} has {experts}: "
                    "a second copy on the same rank takes memory and relieves nobody"
                )

    @property
    def num_ranks(self) -> int:
        """The ranks that share the layer's experts."""
        return len(self.slots)

    @property
    def num_experts(self) -> int:
        """E, the logical experts."""
        return len({expert for rank in self.slots for expert in rank})

    def ranks_of(self, expert: int) -> tuple[int, ...]:
        """The ranks that hold a logical expert, in ascending order."""
        return tuple(rank for rank, experts in enumerate(self.slots) if expert in experts)

    @staticmethod
    def even(num_experts: int, num_ranks: int) -> Placement:
        """Consecutive experts on each rank, as many on each as possible: no replicas."""
        bounds = [rank * num_experts // num_ranks for rank in range(num_ranks + 1)]
        return Placement(tuple(tuple(range(a, b)) for a, b in pairwise(bounds)))


# ---------------------------------------------------------------------------------------------- in the monitor


@dataclass(frozen=True, eq=False)
class RoutingStats:
    """One layer's routing over one window: exact counts and what follows from them. Plain numbers.

    layer: the layer's name in the model. step: the optimizer step at the end of the window.
    num_tokens: real tokens routed. counts_E: int64 assignments per expert, after the decision, before drops.
    dropped: assignments lost, by reason (`DROP_REASONS`); "tokens" counts the tokens that lost all of theirs.
    rerouted: assignments that found no room but another place, by reason (`REROUTE_REASONS`).
    load_entropy: H(f)/ln E of the load shares f, in [0, 1]; 1 is even.
    token_entropy: mean over tokens of H(p_t)/ln E, in [0, 1]; high means that the router is undecided.
    marginal_entropy: H(mean_t p_t)/ln E, in [0, 1]; low means that the router prefers the same experts for all.
    mutual_information: (marginal - token entropy) in nats: how much the token tells about the expert.
    max_violation: max_e c_e/mean(c) - 1 (arXiv 2408.15664), 0 is even, E - 1 is one expert for all at top-1.
    effective_experts: exp(H(f)), in [1, E]: how many equally loaded experts the load is worth.
    max_token_share: share of tokens that reach the busiest expert, in [0, 1]; fair is K/E.
    dead_experts: experts below a tenth of the fair load, when at least 100 assignments each were to be expected.
    logit_mean, logit_std, logit_logsumexp: over tokens (and experts) of the fp32 router logits.
    losses: mean of each balancing loss over the window, before its coefficient.
    load_cv: standard deviation over mean of the counts, in [0, sqrt(E - 1)]; 0 is even.
    gini: Gini's coefficient of the counts, in [0, 1 - 1/E]; 0 is even.
    min_load: load of the least loaded expert relative to fair, in [0, 1]; 1 is even.
    The last three are NaN in records written before they were kept; they follow from counts_E.
    """

    layer: str
    step: int
    num_tokens: int
    counts_E: np.ndarray
    dropped: Mapping[str, int]
    load_entropy: float
    token_entropy: float
    marginal_entropy: float
    mutual_information: float
    max_violation: float
    effective_experts: float
    max_token_share: float
    dead_experts: tuple[int, ...]
    logit_mean: float
    logit_std: float
    logit_logsumexp: float
    losses: Mapping[str, float] = field(default_factory=dict)
    rerouted: Mapping[str, int] = field(default_factory=dict)
    load_cv: float = nan
    gini: float = nan
    min_load: float = nan

    @property
    def num_experts(self) -> int:
        """E, the experts of the layer."""
        return len(self.counts_E)

    @cached_property
    def num_assignments(self) -> int:
        """The sum of counts_E."""
        return int(self.counts_E.sum())

    @property
    def drop_rate(self) -> float:
        """Share of the assignments that were lost, in [0, 1]; what was moved or spilled is not lost."""
        lost = sum(count for reason, count in self.dropped.items() if reason != "tokens")
        return lost / max(self.num_assignments, 1)

    @property
    def load_E(self) -> np.ndarray:
        """float64 (E,), load relative to the fair share: 1 is fair, 0 is dead."""
        total = self.num_assignments
        return self.counts_E * (self.num_experts / total) if total else np.zeros(self.num_experts)


@dataclass(frozen=True, eq=False)
class CoSelection:
    """Which experts the sampled tokens of one layer and window chose together.

    num_tokens: tokens that were sampled. counts_EE: int64 (E, E), symmetric: those that chose both experts; on the
    diagonal those that chose the one.
    """

    layer: str
    step: int
    num_tokens: int
    counts_EE: np.ndarray


@dataclass(frozen=True)
class Finding:
    """A detector's opinion about one window of one layer. The alert book decides whether it becomes an alert.

    rule: the rule's name. layer, expert: what it is about; expert is None for the layer as a whole.
    value, threshold: the measured number and the limit it passed. message: one sentence with the numbers.
    remedy: what to do about it.
    """

    rule: str
    layer: str
    expert: int | None
    severity: Severity
    value: float
    threshold: float
    message: str
    remedy: str


@dataclass(frozen=True)
class Alert:
    """A finding that lasted. state goes firing -> resolved; key names it across its life ("layer:rule")."""

    key: str
    state: Literal["firing", "resolved"]
    since_step: int
    step: int
    finding: Finding


@dataclass(frozen=True)
class Action:
    """One repair, at one moment of its life: a record each time that its state changes.

    kind: e.g. "quantile_bias". layer: the layer's name, or "" for the whole model. step: of this record. reason: the
    key of the alert that led to it. detail: plain numbers, before and after.
    state: "proposed" (nothing was done), "applied" (in force, on trial), then "kept" or "undone"; "failed": nothing was
    changed, or all of it was put back. note: a sentence, e.g. why it was undone.
    """

    kind: str
    layer: str
    step: int
    reason: str
    detail: Mapping[str, float] = field(default_factory=dict)
    state: ActionState = "applied"
    note: str = ""


class Detector(Protocol):
    """Pure: one window of statistics in, findings out."""

    def __call__(self, window: Sequence[RoutingStats]) -> list[Finding]: ...  # noqa: D102 - described by the class


class Sink(Protocol):
    """Something that takes what the monitor has seen: a store, a terminal, a pager."""

    def routing(self, window: Sequence[RoutingStats]) -> None:
        """Take one flushed window, a record per layer."""
        ...

    def alert(self, alert: Alert) -> None:
        """Take an alert when it fires and again when it is resolved."""
        ...

    def action(self, action: Action) -> None:
        """Take a repair that was applied."""
        ...


@runtime_checkable
class CoSelectionSink(Protocol):
    """A sink that also takes which experts were chosen together, where that is recorded."""

    def co_selection(self, window: Sequence[CoSelection]) -> None:
        """Take one flushed window, a record per layer."""
        ...


# ---------------------------------------------------------------------------------------------- between processes


@dataclass(frozen=True)
class Held:
    """Which of a layer's experts a process holds. num_experts: of the layer, those with weights.

    ids: the expert of each place of the weights' first axis. owned: by place, whether the process speaks for it; each
    expert has one that does, however many copies there are.
    """

    num_experts: int
    ids: tuple[int, ...]
    owned: tuple[bool, ...]


class Team(Protocol):
    """The processes that hold one model together, as one of them sees it that is about to change it.

    All of them call the same methods in the same order. What is replicated (routers, balancers, modes) each changes for
    itself; of a layer's experts each holds some.
    """

    @property
    def is_main(self) -> bool:
        """Whether this one reads requests and writes records."""
        ...

    def sum(self, x: Tensor) -> None:
        """Over all processes, in place."""
        ...

    def tell(self, value: T) -> T:
        """What the main process says, in all of them: plain JSON data."""
        ...

    def same(self, x: Tensor) -> Tensor:
        """The main process's values; x has the same shape in all of them."""
        ...

    def rows(self, x: Tensor) -> Tensor:
        """The rows of all processes, in their order; each may have another number of them."""
        ...

    def together(
        self, do: Callable[[], T], undo: Callable[[T], object], same: Callable[[T], str]
    ) -> tuple[T, str] | tuple[None, str]:
        """(what it made, "") where all did it; (None, why not) in all of them where one could not, and the others have
        undone it. same: a text of what it made and left behind, which must not differ.

        Not being able to is a ValueError, RuntimeError or OSError; another error is raised.
        """
        ...

    def held(self, layer: str, here: int) -> Held:
        """Of a layer's experts those whose weights are here, of which there are so many."""
        ...


class OneProcess:
    """A team of one. See `Team`."""

    is_main = True

    def sum(self, x: Tensor) -> None:
        """It is."""

    def tell(self, value: T) -> T:
        """It does."""
        return value

    def same(self, x: Tensor) -> Tensor:
        """They are."""
        return x

    def rows(self, x: Tensor) -> Tensor:
        """Its own."""
        return x

    def together(
        self, do: Callable[[], T], undo: Callable[[T], object], same: Callable[[T], str]
    ) -> tuple[T, str] | tuple[None, str]:
        """Done, or why not."""
        try:
            return do(), ""
        except (ValueError, RuntimeError, OSError) as error:  # what fails must not take the loop with it
            return None, str(error) or type(error).__name__

    def held(self, layer: str, here: int) -> Held:
        """All."""
        return Held(here, tuple(range(here)), (True,) * here)


ALONE: Team = OneProcess()
