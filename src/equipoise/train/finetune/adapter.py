"""A low-rank addition as an adapter in PEFT's files, so that PEFT, or whoever reads them, can put it on the base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from equipoise.disk.atomic import atomic_write
from equipoise.train.finetune.config import FinetuneConfig
from equipoise.train.finetune.held import LowRank

FOLDER = "adapter"
_PREFIX = "base_model.model."


def write_adapter(out: Path, factors: Mapping[str, LowRank], tune: FinetuneConfig) -> None:
    """RUN/adapter/adapter_model.safetensors and adapter_config.json, each whole or as before."""
    folder = out / FOLDER
    with atomic_write(folder / "adapter_model.safetensors") as file:
        file.write(save(peft_tensors(factors), metadata={"format": "pt"}))
    with atomic_write(folder / "adapter_config.json") as file:
        file.write(json.dumps(peft_config(factors, tune), indent=2).encode())


def peft_config(factors: Mapping[str, LowRank], tune: FinetuneConfig) -> dict[str, Any]:
    """The fields of `peft.LoraConfig` that say what the tensors are."""
    modules = sorted({name.removesuffix(".weight").split(".")[-1] for name in factors if name.endswith(".weight")})
    stacked = sorted(name for name in factors if not name.endswith(".weight"))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": tune.base,
        "r": tune.lora,
        "lora_alpha": tune.lora_scale * tune.lora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "target_parameters": stacked,
        "inference_mode": True,
    }


def peft_tensors(factors: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The factors under PEFT's names and in its shapes.

    A linear layer's are (r, in) and (out, r). PEFT wraps a module once for each stacked weight (E, out, in), in the
    order in which the module has them, so the first one's factors are the innermost; they are (E r, in), expert by
    expert, and (out, r E), rank by rank (huggingface/peft:src/peft/tuners/lora/layer.py, ParamWrapper).
    """
    made: dict[str, Tensor] = {}
    for name, held in factors.items():
        a, b = held.a.detach().cpu(), held.b.detach().cpu()
        if name.endswith(".weight"):
            where = name.removesuffix(".weight")
        else:
            module = name.rsplit(".", 1)[0]
            wraps = [other for other in factors if other.rsplit(".", 1)[0] == module]
            where = module + ".base_layer" * (len(wraps) - 1 - wraps.index(name))
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        made[f"{_PREFIX}{where}.lora_A.weight"] = a.contiguous()
        made[f"{_PREFIX}{where}.lora_B.weight"] = b.contiguous()
    return made
