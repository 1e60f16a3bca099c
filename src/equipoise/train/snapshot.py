"""The state of an optimizer and of the random-number generators as tensors and plain JSON, and exactly back.

No files here (disk/checkpoint.py writes them) and no pickle: JSON holds the structure, tensors hold the numbers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equipoise.disk.checkpoint import JSON

# ---------------------------------------------------------------------------------------------- optimizer


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], JSON]:
    """The optimizer's state_dict as named tensors ("state.0.exp_avg") and the JSON that says where each belongs.

    The tensors are the live ones, not copies. Raises ValueError for state that is neither tensor nor plain data.
    """
    tensors: dict[str, Tensor] = {}
    described = _describe(optimizer.state_dict(), "", tensors)
    return tensors, {"shapes": [list(parameter.shape) for parameter in parameters_of(optimizer)], "tree": described}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], json: JSON) -> None:
    """Give `optimizer`, built over the same parameters in the same order, the state that `pack_optimizer` saw.

    Values and dtypes come back exactly; tensors go to their parameter's device. Raises ValueError if the
    parameters' number or shapes differ, or a tensor is missing; then the optimizer is unchanged.
    """
    if not isinstance(json, dict) or not {"shapes", "tree"} <= json.keys():
        raise ValueError("the optimizer's JSON must be what pack_optimizer returned: it has no 'shapes' and 'tree'")
    parameters = parameters_of(optimizer)
    shapes = [list(parameter.shape) for parameter in parameters]
    if shapes != json["shapes"]:
        raise ValueError(_shape_mismatch(shapes, json["shapes"]))
    state_dict = _rebuild(json["tree"], tensors)
    optimizer.load_state_dict(state_dict)
    # load_state_dict casts floating state to the parameter's dtype: fp32 moments of bf16 weights would lose bits.
    for index, values in state_dict["state"].items():
        for name, value in values.items():
            loaded = optimizer.state[parameters[index]][name]
            if isinstance(value, Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameters[index]][name] = value.to(loaded.device)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters in the order in which state_dict numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _shape_mismatch(actual: list[list[int]], expected: Any) -> str:
    remedy = "build the model and the optimizer with the checkpoint's config"
    if len(actual) != len(expected):
        return f"the optimizer has {len(actual)} parameters, the checkpoint {len(expected)}: {remedy}"
    index = next(index for index in range(len(actual)) if actual[index] != expected[index])
    return f"parameter {index} of the optimizer has shape {actual[index]}, the checkpoint {expected[index]}: {remedy}"


def _describe(value: Any, where: str, tensors: dict[str, Tensor]) -> JSON:
    """Move the tensors of a nested value into `tensors`; return its structure as JSON that `_rebuild` reads."""
    if isinstance(value, Tensor):
        tensors[where] = value.detach()
        return {"tensor": where}
    if isinstance(value, dict):  # as pairs, because JSON would turn the integer keys into text
        pairs = [
            [key, _describe(item, f"{where}.{key}" if where else str(key), tensors)] for key, item in value.items()
        ]
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        items = [_describe(item, f"{where}.{index}", tensors) for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"optimizer state {where!r} is a {type(value).__name__}: only tensors, numbers, text, lists, tuples and "
        "dicts can be saved; keep it as one of these"
    )


def _rebuild(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_describe`. The tensors are cloned, so that a step does not write into the caller's."""
    if isinstance(value, list):
        return [_rebuild(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "dict":
        return {key: _rebuild(item, tensors) for key, item in content}
    if kind == "tuple":
        return tuple(_rebuild(item, tensors) for item in content)
    if content not in tensors:
        raise ValueError(f"optimizer tensor {content!r} is missing: pass all tensors that pack_optimizer returned")
    return tensors[content].clone()


# ---------------------------------------------------------------------------------------------- random numbers


def rng_state() -> dict[str, JSON]:
    """The global generators of torch (CPU, and each CUDA device in use), Python and NumPy, as JSON."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)  # for the type checker: legacy=False gives a dict
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": [_to_hex(state) for state in cuda],
        "python": [version, list(words), gauss],
        "numpy": {**numpy, "state": {"key": numpy["state"]["key"].tolist(), "pos": int(numpy["state"]["pos"])}},
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the global generators back to what `rng_state` saw.

    CUDA states go to the devices that are there: on fewer or other devices a run goes on, but with other numbers.
    """
    torch.set_rng_state(_from_hex(state["torch"]))
    for device, words in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(_from_hex(words), device)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy = state["numpy"]
    key = np.asarray(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {"key": key, "pos": numpy["state"]["pos"]}})


def _to_hex(state: Tensor) -> str:
    return bytes(state.cpu().tolist()).hex()


def _from_hex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
