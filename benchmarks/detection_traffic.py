"""What benchmarks.detection shows the monitor: routers on traffic whose mix of domains wanders, faults of all sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from equipoise import MoE, TopK
from equipoise.faults import Collapse, DeadExpert, Drift, Injection, inject
from equipoise.monitor.detectors import MIN_EXPECTED
from equipoise.monitor.stats import RoutingSums
from equipoise.routing import QuantileBalance

DIM, DOMAINS = 32, 6
SHAPES = ((8, 1), (8, 2), (16, 2), (64, 2), (64, 8), (128, 8), (256, 8))
BATCHES = ("training", "decode")
STARVING_WINDOWS, STARVING_LOGITS = 40, 8.0


@dataclass(frozen=True)
class Setting:
    """num_tokens: per flush. flushes: per window."""

    num_experts: int
    top_k: int
    batch: str

    @property
    def num_tokens(self) -> int:
        """A training batch brings 130 assignments per expert; a decode step has 256 sequences."""
        return 256 if self.batch == "decode" else math.ceil(1.3 * MIN_EXPECTED * self.num_experts / self.top_k)

    @property
    def flushes(self) -> int:
        """Flushes until each expert could expect MIN_EXPECTED assignments."""
        return math.ceil(MIN_EXPECTED * self.num_experts / (self.num_tokens * self.top_k))


class Traffic:
    """Tokens of a few domains in a mix that wanders, routed by a router that was balanced on the mix it began with."""

    def __init__(self, setting: Setting, seed: int) -> None:
        torch.manual_seed(seed)
        self.setting, self.generator = setting, torch.Generator().manual_seed(seed)
        self.means_GD = torch.randn(DOMAINS, DIM, generator=self.generator)
        self.mix_G = torch.zeros(DOMAINS)
        router = TopK(k=setting.top_k)
        self.model = nn.ModuleList([MoE(DIM, 4, setting.num_experts, router=router, balance=(QuantileBalance(),))])
        self.layer = self.model[0]
        assert isinstance(self.layer, MoE)
        torch.nn.init.normal_(self.layer.router.weight, std=1 / math.sqrt(DIM))  # type: ignore[arg-type]
        for _ in range(8):  # balanced as training would have left it
            self.layer.balancer.observe(self._route(max(4096, 32 * setting.num_experts)))  # type: ignore[union-attr]
            self.layer.balancer.update()  # type: ignore[union-attr]

    def tokens(self, num_tokens: int) -> Tensor:
        """The next tokens; the mix has moved on a little."""
        step_G = 0.05 * torch.randn(DOMAINS, generator=self.generator) / math.sqrt(self.setting.flushes)
        self.mix_G = (1 - 0.002 / self.setting.flushes) * self.mix_G + step_G
        domains_T = torch.multinomial(self.mix_G.softmax(0), num_tokens, replacement=True, generator=self.generator)
        noise_TD = torch.randn(num_tokens, DIM, generator=self.generator)
        x_TD = 0.5 * self.means_GD[domains_T] + noise_TD
        x_TD[:, 0] = 1.0  # as norms' biases make hidden states: a direction that all tokens share
        return x_TD

    def break_by(self, fault: Fault) -> Injection:
        """Put the fault in, at an expert of chance, by the tokens of now."""
        expert = int(torch.randint(self.setting.num_experts, (), generator=self.generator))
        x_TD = self.tokens(256)
        return inject(self.model, fault.on(expert, self.setting), lambda: self.model[0](x_TD))

    def flush(self) -> RoutingSums:
        """What a recorder would hand over after the next batch."""
        decision = self._route(self.setting.num_tokens)
        counts_E = np.bincount(decision.expert_ids_N.numpy(), minlength=self.setting.num_experts).astype(np.int64)
        z = decision.logits_TE.double()
        return RoutingSums(
            num_tokens=decision.num_tokens,
            counts_E=counts_E,
            probs_sum_E=decision.probs_TE.double().sum(0).numpy(),
            token_entropy_sum=float(torch.special.entr(decision.probs_TE).sum()),
            logit_sum=float(z.sum()),
            logit_sq_sum=float(z.square().sum()),
            logsumexp_sum=float(z.logsumexp(-1).sum()),
            dropped={},
            losses={},
        )

    @torch.no_grad()
    def _route(self, num_tokens: int):  # type: ignore[no-untyped-def]  # a RoutingDecision
        return self.layer.router(self.tokens(num_tokens), self.layer.balancer.bias_E)


# ------------------------------------------------------------------------------------------------- what goes wrong

ModelFault = Collapse | DeadExpert | Drift


@dataclass(frozen=True)
class Fault:
    """windows: how long the monitor may look. noticed: rules that say what it is. on: the fault at an expert."""

    name: str
    on: Callable[[int, Setting], ModelFault]
    noticed: frozenset[str] = frozenset({"collapse", "one_bin", "utilisation_high", "entropy"})
    windows: int = 10


def _collapse(logits: float) -> Fault:
    return Fault(f"+{logits:g} logits", lambda expert, setting: Collapse("0", expert, logits))


def _starve(expert: int, setting: Setting) -> Drift:
    """Half of the experts rise above the others, a little in each flush."""
    rising = tuple((expert + i) % setting.num_experts for i in range(1, setting.num_experts // 2))
    return Drift("0", expert, STARVING_LOGITS, STARVING_WINDOWS * setting.flushes, rising)


STRONG = _collapse(20.0)
WEAKER = (
    *(_collapse(logits) for logits in (10.0, 5.0, 3.0, 2.0, 1.0)),
    Fault("one dead expert", lambda expert, setting: DeadExpert("0", expert), frozenset({"dead_experts"})),
    Fault(
        "half of the experts starve",
        _starve,
        STRONG.noticed | {"dead_experts"},
        windows=STARVING_WINDOWS + 10,
    ),
)
