"""A fault of an expert's weights: one number that is none."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn

from equipoise.faults.injection import Change, Run, check_seed, team_of
from equipoise.faults.targets import check_expert, find, tensor_at


@dataclass(frozen=True)
class NaNExpert:
    """One value in one expert's weights becomes NaN; the seed chooses which.

    Imitates a flipped bit, or an overflow in an update: the tokens of that expert are lost, and with them the loss.
    Taken out: the value it had is put back, also after steps in which it stayed NaN. What NaN gradients have spread to
    other weights meanwhile is not undone; a value that is a number again, as after a rollback, is left alone.
    """

    layer: str
    expert: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed("NaNExpert", self.seed)

    def put_in(self, model: nn.Module, run: Run | None) -> Change:
        """Write the NaN."""
        target = find(model, "NaNExpert", self.layer)
        check_expert("NaNExpert.expert", target, self.expert)
        places = target.places(self.expert, team_of(run))
        paths = target.stacked_weights()
        if not paths:
            raise ValueError(
                f"NaNExpert.layer: expected experts with stacked weights [E, ., .] of floating numbers, {self.layer} "
                "has none in this process; choose another layer, or a process that has the whole model"
            )
        sizes = [tensor_at(target.experts, path).shape[1:].numel() for path in paths]
        place = random.Random(self.seed).randrange(sum(sizes))  # every value is as likely
        path = next(path for path, end in zip(paths, accumulate(sizes), strict=True) if place < end)
        place -= sum(sizes[: paths.index(path)])
        row, column = divmod(place, tensor_at(target.experts, path).shape[2])
        values = {each: tensor_at(target.experts, path)[each, row, column].item() for each in places}

        @torch.no_grad()
        def put_back() -> None:
            weight = tensor_at(target.experts, path)
            for each, value in values.items():
                if bool(weight[each, row, column].isnan()):
                    weight[each, row, column] = value

        with torch.no_grad():
            for each in places:
                tensor_at(target.experts, path)[each, row, column] = math.nan
        return Change(put_back)
