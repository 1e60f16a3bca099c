"""Which experts a task uses: scored on some of its text, layer by layer, and the fewest that hold enough of the score.

Expert-Specialised Fine-Tuning, ESFT (arXiv 2407.01906, section 3.3). Scores come from the decisions as the routers made
them. They are normalised within each layer; the code published with the paper (deepseek-ai/ESFT,
scripts/expert/generate_expert_config.py) divides by a sum over layers, by which a layer's scores do not add up to 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.disk.atomic import atomic_write
from equipoise.models.decoder import Decoder
from equipoise.train.finetune.config import FinetuneConfig, Score
from equipoise.types import Routed

FILE = "task_experts.json"


@dataclass(frozen=True)
class TaskExperts:
    """The choice in one layer.

    scores: of all experts, sum 1. chosen: ascending. counts: assignments per expert in the sample, exact. num_tokens:
    of the sample.
    """

    layer: str
    scores: tuple[float, ...]
    chosen: tuple[int, ...]
    counts: tuple[int, ...]
    num_tokens: int

    def sentence(self) -> str:
        """For a person."""
        share = sum(self.scores[expert] for expert in self.chosen)
        names, total = ", ".join(map(str, self.chosen)), len(self.scores)
        return f"{self.layer}: trains {len(self.chosen)} of {total} experts ({names}), {share:.0%} of the score"


class Uses:
    """How much one layer used each expert: assignments, and the sum of their weights."""

    def __init__(self, num_experts: int) -> None:
        self.counts_E = torch.zeros(num_experts, dtype=torch.int64)
        self.weights_E = torch.zeros(num_experts, dtype=torch.float64)
        self.num_tokens = 0

    @torch.no_grad()
    def add(self, module: nn.Module, args: object, routed: Routed) -> None:
        """A forward's decision; a hook of the layer's tap."""
        decision = routed.decision
        ids_N = decision.expert_ids_N.cpu()
        self.counts_E += torch.bincount(ids_N, minlength=len(self.counts_E))
        self.weights_E.index_add_(0, ids_N, decision.weights_N.detach().double().cpu())
        self.num_tokens += decision.num_tokens

    def scores(self, score: Score) -> Tensor:
        """float64 (E,), sum 1. gate: the average weight that a token gives the expert. token: the average over tokens
        of 1/K where the expert is chosen, which is its share of the assignments. Both relative to the layer's sum.
        """
        used_E = self.weights_E if score == "gate" else self.counts_E.double()
        return used_E / used_E.sum().clamp_min(torch.finfo(torch.float64).tiny)


def smallest_set(scores_E: Tensor, share: float) -> tuple[int, ...]:
    """The fewest experts whose scores add up to at least `share`; ascending. Of equal ones the lower index comes first.

    scores_E: sum 1. At least one expert, and all that have a score if `share` is more than rounding lets them reach.
    """
    order_E = torch.sort(scores_E, descending=True, stable=True).indices
    reached_E = scores_E[order_E].cumsum(0)
    enough = int((reached_E < share).sum()) + 1
    return tuple(sorted(order_E[:enough].tolist()))


@contextmanager
def used_experts(model: Decoder) -> Iterator[Mapping[str, Uses]]:
    """Counts, by layer, what the forwards inside decide."""
    uses = {name: Uses(layer.num_experts) for name, layer in model.moe_layers.items()}
    handles = [layer.tap.register_forward_hook(uses[name].add) for name, layer in model.moe_layers.items()]
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


def choose(uses: Mapping[str, Uses], config: FinetuneConfig) -> tuple[TaskExperts, ...]:
    """The choice of every layer."""
    made = []
    for layer, used in uses.items():
        scores_E = used.scores(config.task_score)
        chosen = smallest_set(scores_E, config.share)
        counts = tuple(used.counts_E.tolist())
        made.append(TaskExperts(layer, tuple(scores_E.tolist()), chosen, counts, used.num_tokens))
    return tuple(made)


def write_choice(out: Path, choice: tuple[TaskExperts, ...], config: FinetuneConfig) -> None:
    """Keep it in the run folder, with what it was made by."""
    made_by = {"score": config.task_score, "share": config.share}
    with atomic_write(out / FILE) as file:
        file.write(json.dumps(made_by | {"layers": [asdict(layer) for layer in choice]}, indent=2).encode())


def read_choice(out: Path) -> tuple[TaskExperts, ...]:
    """What `write_choice` kept. Raises ValueError where it is missing or damaged: another choice is another run."""
    try:
        return tuple(map(_from_json, json.loads((out / FILE).read_bytes())["layers"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{out / FILE}: expected the experts that this run trains, got {error!r}; restore it, or start a new run "
            "with another --out"
        ) from error


def _from_json(record: Mapping[str, Any]) -> TaskExperts:
    lists = {name: tuple(record[name]) for name in ("scores", "chosen", "counts")}
    return TaskExperts(**{**record, **lists})
