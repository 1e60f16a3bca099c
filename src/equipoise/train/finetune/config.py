"""What defines a fine-tuning: whose weights, which of them are trained, from which step, how fast. Plain and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

Trained = Literal["all", "router", "non-moe", "experts", "task-experts"]
Score = Literal["gate", "token"]
Group = Literal["router", "experts", "shared", "attention", "rest"]

# Which groups of weights each choice trains. ESFT (arXiv 2407.01906) leaves shared experts as they are.
TRAINS: dict[Trained, frozenset[Group]] = {
    "all": frozenset({"router", "experts", "shared", "attention", "rest"}),
    "router": frozenset({"router"}),
    "non-moe": frozenset({"attention", "rest"}),
    "experts": frozenset({"experts", "shared"}),
    "task-experts": frozenset({"experts"}),
}
ADAPTED: frozenset[Group] = frozenset({"attention", "experts"})  # what LoRA is for
TASK_SHARE: dict[Score, float] = {"gate": 0.1, "token": 0.2}  # ESFT, section 4.1
FREEZE_ROUTER = 100


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How the recipe finetune trains; all of it is kept in the run's config.json."""

    base: Annotated[str, tyro.conf.arg(name="from")] = ""
    """The run folder whose model is tuned, as train, upcycle and convert write it, or a checkpoint in one."""
    train: Trained = "all"
    """What is trained. non-moe is all but routers and experts; experts has the shared ones too; task-experts
    are those that the new text is routed to."""
    freeze_router: int | None = None
    """Steps before the routers are trained; 100, or 0 where nothing else is. Resumed runs keep to it."""
    freeze_experts: bool = False
    """Leave routed and shared experts as they are."""
    move_bias: bool = False
    """Let the balancers' biases go on adapting; they stay as they are otherwise."""
    balance: float = 0.0
    """Coefficient of the balancing losses, in place of the base's. On narrow text an uneven load is what
    experts are for; 0.001 to 0.0001 is a light hand."""
    lr_router: float = 0.1
    """The routers' learning rate, as a multiple of lr."""
    lr_experts: float = 1.0
    """The experts'."""
    lr_attention: float = 1.0
    """Attention's."""
    lr_rest: float = 1.0
    """That of embeddings, norms and dense layers."""
    task_score: Score = "gate"
    """For task-experts: by average combine weight, or by the share of tokens that choose an expert."""
    task_share: float | None = None
    """For task-experts: take the fewest experts of each layer with this share of the score; 0.1 or 0.2."""
    task_tokens: int = 16_384
    """For task-experts: how many tokens of the new text they are chosen by."""
    lora: int = 0
    """Train low-rank additions of this rank to attention and experts, and nothing else; 0 trains the weights
    themselves."""
    lora_alpha: float | None = None
    """Scale of the additions, times the rank; twice the rank if left out."""
    compare_every: int = 50
    """Steps between comparisons of the routing with the base model's, on the same held-out tokens."""

    def __post_init__(self) -> None:
        for name in ("lr_router", "lr_experts", "lr_attention", "lr_rest", "balance", "lora"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"finetune.{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("task_tokens", "compare_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"finetune.{name}: expected at least 1, got {getattr(self, name)}")
        if self.freeze_router is not None and self.freeze_router < 0:
            raise ValueError(f"finetune.freeze_router: expected 0 or more steps, got {self.freeze_router}")
        if self.task_share is not None and not 0 < self.task_share <= 1:
            raise ValueError(f"finetune.task_share: expected a share above 0 and up to 1, got {self.task_share}")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"finetune.lora_alpha: expected more than 0, got {self.lora_alpha}")
        _check_that_something_is_trained(self)

    @property
    def router_starts(self) -> int:
        """The number of steps for which the routers stay as they are."""
        if self.freeze_router is None:
            return 0 if self.train == "router" else FREEZE_ROUTER
        return self.freeze_router

    @property
    def trained(self) -> frozenset[Group]:
        """The groups of weights that change at all."""
        groups = TRAINS[self.train]
        if self.freeze_experts:
            groups -= {"experts", "shared"}
        return groups & ADAPTED if self.lora else groups

    @property
    def share(self) -> float:
        """P of ESFT."""
        return TASK_SHARE[self.task_score] if self.task_share is None else self.task_share

    @property
    def lora_scale(self) -> float:
        """What the product of the two factors is multiplied with: alpha / rank (arXiv 2106.09685, section 4.1)."""
        return 2.0 if self.lora_alpha is None else self.lora_alpha / max(self.lora, 1)

    def rate_of(self, group: Group) -> float:
        """The group's learning rate, as a multiple of the run's."""
        rates = {"router": self.lr_router, "attention": self.lr_attention, "rest": self.lr_rest}
        return rates.get(group, self.lr_experts)


def _check_that_something_is_trained(config: FinetuneConfig) -> None:
    if config.train not in TRAINS:
        raise ValueError(f"finetune.train: expected one of {', '.join(TRAINS)}, got {config.train!r}")
    if config.task_score not in TASK_SHARE:
        raise ValueError(f"finetune.task_score: expected gate or token, got {config.task_score!r}")
    if config.lora and config.train == "task-experts":
        raise ValueError("finetune.lora: expected 0 with train=task-experts, whose weights are few already; drop one")
    if config.lora and config.move_bias:
        raise ValueError("finetune.move_bias: expected False with lora: an adapter can't hold the bias it was made for")
    if not config.trained:
        extra = ", freeze_experts" * config.freeze_experts + f", lora={config.lora}" * bool(config.lora)
        raise ValueError(f"finetune: nothing would be trained with train={config.train}{extra}; leave one out")
    if config.train == "router" and config.freeze_router:
        raise ValueError(
            f"finetune.freeze_router: expected 0 with train=router, got {config.freeze_router}: nothing would be "
            "trained until then; leave it out"
        )
