"""How surely and soon a collapse is noticed, how often a healthy router is blamed: python -m benchmarks.detection

Real routers on synthetic traffic whose mix of domains drifts, broken by the fault injector, watched by
the rules and the alert book that run in training. A window is what brings 100 assignments per expert: one flush for
batches of training, many for decoded tokens. Both profiles judge the same traffic.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.report import Report, Table, add_output_arguments, announce, emit
from equipoise import MoE, TopK
from equipoise.faults import Collapse, inject
from equipoise.monitor.alerts import AlertBook
from equipoise.monitor.detectors import MIN_EXPECTED, layers_without_opinion
from equipoise.monitor.profiles import Profile, rules_of
from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.monitor.window import TimeWindow
from equipoise.routing import QuantileBalance

DIM, DOMAINS, BOOK_WINDOWS = 32, 6, 3
LOWEST = 0.3  # of the logarithmic axis
PROFILES: tuple[Profile, ...] = ("relative", "absolute")
SHAPES = ((8, 1), (8, 2), (16, 2), (64, 2), (64, 8), (128, 8), (256, 8))
BATCHES = ("training", "decode")


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

    def break_router(self) -> None:
        """One expert becomes everybody's first choice."""
        expert = int(torch.randint(self.setting.num_experts, (), generator=self.generator))
        x_TD = self.tokens(256)
        inject(self.model, Collapse("0", expert, intensity=20.0), lambda: self.model[0](x_TD))

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


@dataclass
class Watcher:
    """A profile's rules, window and alert book, as `equipoise.watch` has them."""

    profile: Profile
    span: TimeWindow = field(default_factory=lambda: TimeWindow(1e9))
    book: AlertBook = field(default_factory=AlertBook)
    step: int = 0

    def see(self, sums: RoutingSums) -> list[str]:
        """The rules whose alerts fire on this flush."""
        self.step += 1
        self.span.add(float(self.step), {"0": sums})
        seen = self.span.recent(MIN_EXPECTED)
        judged = [routing_stats("0", self.step, seen["0"])]
        findings = [finding for rule in rules_of(self.profile) for finding in rule(judged)]
        unjudged = layers_without_opinion(judged) if self.profile == "relative" else set()
        changed = self.book.observe(self.step, findings, unjudged=unjudged)
        return [alert.finding.rule for alert in changed if alert.state == "firing"]


@dataclass
class Tally:
    """Of one setting and profile. delays: windows from the fault to the first alert after it; inf where none came."""

    delays: list[float] = field(default_factory=list)
    healthy_windows: float = 0.0
    false_alarms: Counter[str] = field(default_factory=Counter)

    def caught(self, within: float = BOOK_WINDOWS) -> float:
        """Share of the faults that were noticed within so many windows."""
        return sum(delay <= within for delay in self.delays) / max(len(self.delays), 1)


def run_seed(setting: Setting, seed: int, healthy: int, tallies: dict[Profile, Tally]) -> None:
    """One router: `healthy` windows in health, then the fault, then up to ten windows more."""
    traffic = Traffic(setting, seed)
    watchers = {profile: Watcher(profile) for profile in PROFILES}
    for _ in range(healthy * setting.flushes):
        sums = traffic.flush()
        for profile, watcher in watchers.items():
            tallies[profile].false_alarms.update(watcher.see(sums))
    traffic.break_router()
    waiting = set(PROFILES)
    for flush in range(1, 10 * setting.flushes + 1):
        sums = traffic.flush()
        for profile in sorted(waiting):
            if any(rule in NOTICED for rule in watchers[profile].see(sums)):
                tallies[profile].delays.append(flush / setting.flushes)
                waiting.discard(profile)
        if not waiting:
            break
    for profile in PROFILES:
        tallies[profile].healthy_windows += healthy
        if profile in waiting:
            tallies[profile].delays.append(math.inf)


NOTICED = {"collapse", "one_bin", "utilisation_high", "entropy"}  # what pages; a warning that is always there does not


def settings(smoke: bool) -> Iterator[Setting]:
    """Shapes by batches."""
    for num_experts, top_k in SHAPES[:2] if smoke else SHAPES:
        for batch in BATCHES:
            yield Setting(num_experts, top_k, batch)


def measure(seeds: int, healthy: int, smoke: bool) -> dict[Setting, dict[Profile, Tally]]:
    """All settings, with a progress bar on the terminal."""
    results: dict[Setting, dict[Profile, Tally]] = {}
    work = [(setting, seed) for setting in settings(smoke) for seed in range(seeds)]
    for setting, seed in track(work, description="routers", disable=smoke):
        windows = healthy if setting.batch == "training" else max(healthy // 8, 1)  # these take many flushes each
        tallies = results.setdefault(setting, {profile: Tally() for profile in PROFILES})
        run_seed(setting, seed, windows, tallies)
    return results


def table_of(results: dict[Setting, dict[Profile, Tally]], profile: Profile) -> Table:
    """One row per setting, and one for all."""
    rows = []
    total = Tally()
    for setting, tallies in results.items():
        tally = tallies[profile]
        rows.append((f"E={setting.num_experts} k={setting.top_k} {setting.batch}", *_cells(tally)))
        total.delays += tally.delays
        total.healthy_windows += tally.healthy_windows
        total.false_alarms += tally.false_alarms
    rows.append(("all", *_cells(total)))
    columns = (
        "router",
        "faults",
        "caught in 3 windows [%]",
        "windows, median",
        "healthy windows",
        "false alarms",
        "which",
    )
    return Table(f'profile="{profile}"', columns, tuple(rows))


def _cells(tally: Tally) -> tuple[str | float | int, ...]:
    which = ", ".join(f"{rule} {count}" for rule, count in tally.false_alarms.most_common(3))
    median = float(np.median(tally.delays)) if tally.delays else math.inf
    caught = round(100 * tally.caught(), 1)
    return len(tally.delays), caught, round(median, 2), int(tally.healthy_windows), tally.false_alarms.total(), which


def draw(results: dict[Setting, dict[Profile, Tally]], path: Path) -> None:
    """Share noticed against windows since the fault, and false alarms per healthy window, for both profiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for profile, colour in zip(PROFILES, ("#20639b", "#c8321e"), strict=True):
        delays = np.sort([delay for tallies in results.values() for delay in tallies[profile].delays])
        share = np.arange(1, len(delays) + 1) / len(delays) * 100
        left.step(delays, share, where="post", color=colour, linewidth=2, label=profile)
        false = sum(tallies[profile].false_alarms.total() for tallies in results.values())
        windows = sum(tallies[profile].healthy_windows for tallies in results.values())
        rate = 1e5 * false / max(windows, 1)
        right.bar([profile], [rate], color=colour)  # none where there was none: the axis is logarithmic
        right.annotate(f"{false:,} in {windows:,.0f}", (profile, max(rate, LOWEST)), ha="center", va="bottom")
    left.axvline(BOOK_WINDOWS, color="#666666", linewidth=1, linestyle=":")
    left.set(xlim=(0, 5), ylim=(0, 102), xlabel="windows since the router broke", ylabel="noticed, % of the faults")
    left.legend(frameon=False, loc="lower right")
    right.set(yscale="log", ylim=(LOWEST, 1e5), ylabel="false alarms per 100,000 healthy windows")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="routers per setting, each broken once (default 200)")
    parser.add_argument(
        "--healthy", type=int, default=64, help="healthy windows before each fault, an eighth for decode (default 64)"
    )
    parser.add_argument("--picture", type=Path, default=Path("docs/img/detection.png"), help="where to draw")
    add_output_arguments(parser)
    arguments = parser.parse_args()
    seeds, healthy = (2, 3) if arguments.smoke else (arguments.seeds, arguments.healthy)
    announce(f"{seeds} routers per setting")
    results = measure(seeds, healthy, arguments.smoke)
    if not arguments.smoke:
        draw(results, arguments.picture)
    tables = tuple(table_of(results, profile) for profile in PROFILES)
    emit(Report({"seeds": seeds, "healthy windows per router": healthy}, tables), arguments)


if __name__ == "__main__":
    main()
