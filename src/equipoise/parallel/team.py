"""What ranks that repair one model together agree on: words, sums, and whether something was done by all or by none.

Words are JSON, not pickles. Whatever one rank can't do, all learn of in the same place, so that none waits for another
that has given up. A rank that dies is a CollectiveError on the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.parallel.apply import ExpertParallel
from equipoise.parallel.exchange import CollectiveError, Meter
from equipoise.parallel.mesh import Ranks
from equipoise.types import Held

T = TypeVar("T")
WORDS, ROWS = "a word of the ranks about a repair", "rows of all ranks for a repair"


@dataclass(frozen=True, eq=False)
class RankTeam:
    """The ranks of a model that is spread over them. See `Team` in `equipoise.types`."""

    parallel: ExpertParallel

    @property
    def ranks(self) -> Ranks:
        """All of them."""
        return self.parallel.ranks

    @property
    def is_main(self) -> bool:
        """Rank 0."""
        return self.ranks.is_main

    def sum(self, x: Tensor) -> None:
        """In place, wherever x is."""
        there = x.to(self.ranks.mesh.device_type)
        self.ranks.sum(there)
        if there is not x:
            x.copy_(there)

    def tell(self, value: T) -> T:
        """As JSON."""
        told: T = everyone(value if self.is_main else None, self.ranks)[0]
        return told

    def same(self, x: Tensor) -> Tensor:
        """Broadcast."""
        there = x.detach().to(self.ranks.mesh.device_type, copy=True).contiguous()
        work = dist.broadcast(there, src=0, group=self.ranks.world, async_op=True)
        assert work is not None
        Meter(ROWS).wait(work)
        return there.to(x.device)

    def rows(self, x: Tensor) -> Tensor:
        """Gathered, with the shorter ones padded on the way."""
        lengths = everyone(len(x), self.ranks)
        padded = x.detach().new_zeros(max(lengths), *x.shape[1:])
        padded[: len(x)] = x.detach()
        parts = gather(padded, self.ranks)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def together(
        self, do: Callable[[], T], undo: Callable[[T], object], same: Callable[[T], str]
    ) -> tuple[T, str] | tuple[None, str]:
        """Each does it, then all say what came of it."""
        made: list[T] = []
        problem, text, unforeseen = "", "", None
        try:
            made.append(do())
            text = same(made[0])
        except CollectiveError:
            raise  # a rank is gone: there is nobody to agree with
        except (ValueError, RuntimeError, OSError) as error:
            problem = str(error) or type(error).__name__
        except Exception as error:  # the others must hear of it before it ends this rank
            problem, unforeseen = f"{type(error).__name__}: {error}", error
        answers = everyone([problem, text, unforeseen is not None], self.ranks)
        why = _why_not(answers)
        if not why:
            return made[0], ""
        for each in made:
            undo(each)
        if unforeseen is not None:
            raise unforeseen
        if any(ends for _, _, ends in answers):
            raise CollectiveError(f"rank {self.ranks.rank}: another rank has failed in a repair: {why}")
        return None, why

    def held(self, layer: str, here: int) -> Held:
        """By the placement in force; the first copy counts, in the first data group."""
        placement, own, ids = self.parallel.placements[layer], self.ranks.expert_rank, self.parallel.slots(layer)
        first = tuple(not self.ranks.data_rank and placement.ranks_of(expert)[0] == own for expert in ids)
        return Held(placement.num_experts, ids, first)


def everyone(value: Any, ranks: Ranks) -> list[Any]:
    """What each rank says, plain JSON data, in the order of ranks. Raises CollectiveError when one does not come."""
    device = ranks.mesh.device_type
    text = json.dumps(value).encode()
    lengths = [int(each) for each in gather(torch.tensor([len(text)], device=device), ranks, WORDS)]
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    words = gather(padded, ranks, WORDS)
    return [json.loads(bytes(word[:length].cpu().tolist())) for word, length in zip(words, lengths, strict=True)]


def gather(x: Tensor, ranks: Ranks, what: str = ROWS) -> list[Tensor]:
    """Each rank's tensor, of one shape, on x's device. what: for the message of the CollectiveError."""
    there = x.to(ranks.mesh.device_type).contiguous()
    out = [torch.empty_like(there) for _ in range(ranks.size)]
    work = dist.all_gather(out, there, group=ranks.world, async_op=True)
    assert work is not None
    Meter(what).wait(work)
    return [each.to(x.device) for each in out]


def _why_not(answers: list[tuple[str, str, bool]]) -> str:
    """Why it was not done, by what the ranks say; empty when all did the same."""
    problems = {rank: problem for rank, (problem, _, _) in enumerate(answers) if problem}
    if len(problems) == len(answers) and len(set(problems.values())) == 1:
        return problems[0]  # none can: it is not the rank
    if problems:
        return "; ".join(f"rank {rank}: {problem}" for rank, problem in problems.items())
    others = [rank for rank, (_, text, _) in enumerate(answers) if text != answers[0][1]]
    if others:
        return f"rank {others[0]} came to something else than rank 0; it was undone on all ranks"
    return ""
