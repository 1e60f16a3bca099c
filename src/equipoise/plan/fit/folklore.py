"""Rules of thumb that articles repeat, and what they come to for one model: claimed, computed, and what is wrong."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from equipoise.plan.fit.facts import Facts


@dataclass(frozen=True)
class RuleOfThumb:
    """rule: as it is told. claimed, computed: in the unit that it is told in. verdict: in a sentence."""

    rule: str
    claimed: str
    computed: str
    verdict: str

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def rules_of_thumb(facts: Facts) -> list[RuleOfThumb]:
    """For a model with experts; nothing for a dense one."""
    routed, counts = facts.model.routed, facts.counts
    if routed is None:
        return []
    one = counts.outside_experts + counts.experts / routed.num  # the model with a single expert per layer
    found = [
        RuleOfThumb(
            "E experts are E whole models (8x7B = 56B)",
            f"{routed.num * one / 1e9:,.1f} B",
            f"{counts.total / 1e9:,.1f} B",
            f"experts share all but the feed-forward parts: {counts.total / one:.2f} times the model with one expert, "
            f"not {routed.num} times",
        ),
        RuleOfThumb(
            "about 20 % of the parameters are active",
            "20 %",
            f"{100 * counts.active_share:.1f} %",
            "k of E experts, and everything outside them: there is no common share",
        ),
        RuleOfThumb(
            "memory goes with the active parameters",
            f"{facts.active_gib:,.1f} GiB",
            f"{facts.weights_gib:,.1f} GiB",
            f"all experts must be there: {facts.weights_gib / facts.active_gib:.1f} times as much",
        ),
        RuleOfThumb(
            "batches below 8 waste an MoE",
            f"all {facts.weights_gib:,.1f} GiB are read",
            f"{facts.read_gib:,.1f} GiB per rank",
            f"a step of {facts.tokens} token{'s' if facts.tokens > 1 else ''} meets {100 * facts.met:.0f} % of the "
            "experts; a single token reads the active parameters alone",
        ),
    ]
    if facts.setup.mesh.expert > 1:
        layer = facts.communication.layer_s
        found.append(
            RuleOfThumb(
                "expert parallelism costs 10-30 ms per layer, or 300",
                "10-300 ms",
                f"{1e3 * layer:.3g} ms",
                f"{facts.communication.dispatch_bytes / 1e6:.3g} MB there over {facts.machine.link.rate / 1e9:.3g} "
                "GB/s: bytes and links decide, not a constant",
            )
        )
    return [*found, *_decisions(facts)]


def _decisions(facts: Facts) -> list[RuleOfThumb]:
    """Rules that choose an architecture by one number."""
    size = facts.counts.total / 1e9
    by_size = "dense" if size < 7 else "MoE" if size > 100 else "neither"
    step = 1e3 * facts.step_s
    return [
        RuleOfThumb(
            "dense below 7 B (or 1 B), MoE above 100 B",
            by_size,
            f"{size:,.1f} B",
            "size decides nothing by itself: with 1.3 B of 6.9 B active, training took half the time of a dense model "
            "of 1.3 B (arXiv 2409.02060); memory, batch and links decide, see the advice",
        ),
        RuleOfThumb(
            "dense below 50 ms, since MoE adds 10-30 ms per layer",
            "dense",
            f"{step:,.3g} ms a step",
            f"at the least; exchanges are {100 * facts.communication.step_share:.0f} % of it",
        ),
        RuleOfThumb(
            "a mixture of attention beyond 8K of context",
            "yes" if facts.setup.context > 8192 else "no",
            f"scores: {100 * facts.score_share:.0f} % of operations",
            "heads that share keys and values cache no less and stay quadratic; windows, latent attention and fewer "
            "key/value heads are what long context asks for",
        ),
    ]
