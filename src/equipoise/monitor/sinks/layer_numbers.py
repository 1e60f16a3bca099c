"""The numbers of one layer and window under the names that plots and metrics use, in one place.

It computes nothing that `RoutingStats` has not; counts per expert stay out: 256 series per layer are a table's job.
"""

from __future__ import annotations

from collections.abc import Mapping

from equipoise.types import RoutingStats

# name -> (unit in OpenTelemetry's spelling, what it is)
NUMBERS: Mapping[str, tuple[str, str]] = {
    "num_tokens": ("{token}", "Tokens routed in the window"),
    "load_entropy": ("1", "Entropy of the load over ln E; 1 is even"),
    "token_entropy": ("1", "Mean entropy of a token's probabilities over ln E; high is undecided"),
    "marginal_entropy": ("1", "Entropy of the mean probabilities over ln E; low prefers the same experts for all"),
    "mutual_information": ("nat", "How much the token tells about the expert"),
    "max_violation": ("1", "Busiest expert's load over the mean, less 1; 0 is even"),
    "effective_experts": ("{expert}", "How many equally loaded experts the load is worth"),
    "max_token_share": ("1", "Share of tokens that reach the busiest expert; fair is K/E"),
    "num_dead_experts": ("{expert}", "Experts below a tenth of the fair load"),
    "logit_mean": ("1", "Mean router logit"),
    "logit_std": ("1", "Standard deviation of the router logits"),
    "logit_logsumexp": ("1", "Mean logsumexp of the router logits"),
}


def layer_numbers(stats: RoutingStats) -> dict[str, float]:
    """The numbers in `NUMBERS`, then "loss/NAME", "dropped/REASON" and "rerouted/REASON" as far as there are any."""
    named = {name: getattr(stats, name) for name in NUMBERS if name != "num_dead_experts"}
    named["num_dead_experts"] = len(stats.dead_experts)
    named.update({f"loss/{name}": value for name, value in stats.losses.items()})
    named.update({f"dropped/{reason}": count for reason, count in stats.dropped.items()})
    named.update({f"rerouted/{reason}": count for reason, count in stats.rerouted.items()})
    return {name: float(value) for name, value in named.items()}
