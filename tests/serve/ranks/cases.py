"""Run folders whose models are spread in the tests of this folder, in float64 unless the case says otherwise."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tests.serve.small import TOKENIZER, tiny_model

from equipoise.disk.checkpoint import save_checkpoint
from equipoise.layer import Capacity
from equipoise.layer.zero_experts import ZeroExperts
from equipoise.models.decoder import Decoder
from equipoise.models.run_files import write_held_out
from equipoise.plan.placement_file import write_placements
from equipoise.types import Placement

E = 8


@dataclass(frozen=True)
class Case:
    """moe: fields of MoEConfig. model: of DecoderConfig. placement: by the number of ranks. tolerance: of logits."""

    moe: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    placement: Callable[[int], Placement] | None = None
    payload: str = "as_is"
    dtype: torch.dtype | None = None
    tolerance: float = 1e-5  # weights of assignments travel in float32


def replicas(ranks: int) -> Placement:
    """Experts 0 and 1 everywhere, the others spread."""
    return Placement(tuple((*(e for e in range(2, E) if e % ranks == rank), 1, 0) for rank in range(ranks)))


def none_here(ranks: int) -> Placement:
    """The front has no expert, the last rank most of them."""
    return Placement(((), *((e,) for e in range(ranks - 2)), tuple(reversed(range(ranks - 2, E)))))


CASES = {
    "plain": Case(),
    "shared experts and a capacity": Case({"shared_experts": 1, "capacity": Capacity(1.0, at_inference=True)}),
    "zero experts": Case({"zero_experts": ZeroExperts(zero=1, copy=1)}),
    "shortcut": Case({"shortcut": "pos2", "shared_experts": 1}, {"num_layers": 4, "moe_layers": (1, 3)}),
    "replicas": Case(placement=replicas),
    "none here": Case(placement=none_here),
    "biases": Case({"expert_bias": True, "activation": "clamped_swiglu"}),
    "bf16 rows": Case(payload="bf16", tolerance=0.1),
    "int8 rows": Case(payload="int8", tolerance=0.1),
    "bf16 weights": Case(dtype=torch.bfloat16, tolerance=0.3),
}
LARGE = Case({"hidden_dim": 16384})  # 192 MB of experts: two layers of 8, three times 32 by 16384 float64 each


def model_of(case: Case, step: int) -> Decoder:
    model = tiny_model(step)
    moe = replace(model.config.moe, **case.moe)
    return tiny_model(step, moe=moe, **case.model)


def make_run(case: Case, folder: Path, ranks: int) -> None:
    """With checkpoints of steps 1 to 3, of which the last has a number that is none in the last expert."""
    folder.mkdir(parents=True)
    config = json.loads(model_of(case, 1).config.to_json())
    (folder / "config.json").write_text(json.dumps({"name": "x", "model": config}))
    TOKENIZER.save(folder)
    write_held_out(folder, torch.randint(256, (4, 17)))
    for step in (1, 2, 3):
        model = model_of(case, step)
        if step == 3:
            with torch.no_grad():
                list(model.moe_layers.values())[-1].experts.down_proj[-1, 0, 0] = torch.nan
        save_checkpoint(folder / "checkpoints", step, {"model": dict(model.state_dict())}, {})
    if case.placement is not None:
        placement = case.placement(ranks)
        write_placements(folder / "placement.json", dict.fromkeys(model.moe_layers, placement))
