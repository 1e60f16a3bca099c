"""Replace weights of a live model by verified ones: all of them or none, and back again.

In place: parameters and buffers stay the same objects, so optimizers and hooks keep them; an optimizer's own state is
not touched. It reads no files, and does not wait for running forwards (`Gate` does).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Swap:
    """What was done, and the way back. changed: names whose values really differ. digest: of the new values."""

    def __init__(self, targets: Mapping[str, Tensor], before: Mapping[str, Tensor], digest: str) -> None:
        self._targets, self._before = dict(targets), dict(before)
        self.changed = tuple(name for name, target in targets.items() if not _same(target, before[name]))
        self.digest = digest

    @torch.no_grad()
    def undo(self) -> None:
        """Put the old values back exactly, also after further training. Twice is once."""
        for name, target in self._targets.items():
            target.copy_(self._before[name])


@torch.no_grad()
def swap(model: nn.Module, tensors: Mapping[str, Tensor], *, whole: bool = False) -> Swap:
    """Copy the tensors into the model's parameters and buffers of these names.

    whole: every name of the model's state dict must be there. A cast between floating-point types is made; any other
    must be exact. Raises ValueError that lists what is wrong, and changes nothing, for unknown or missing names, other
    shapes, types that do not fit, and values that are not finite; whatever fails later, all is put back.
    """
    state = _state(model)
    if problems := _problems(state, tensors, whole):
        raise ValueError(f"swap: nothing was changed: {'; '.join(problems)}. Load weights of this very model")
    targets = {name: state[name] for name in tensors}
    new = {name: tensor.to(targets[name]) for name, tensor in tensors.items()}
    before = {name: target.detach().clone() for name, target in targets.items()}
    try:
        for name, target in targets.items():
            target.copy_(new[name])
        if wrong := [name for name, target in targets.items() if not _same(target, new[name])]:
            raise RuntimeError(f"swap: {wrong[0]} does not hold what was copied into it; all was put back")
    except BaseException:
        for name, target in targets.items():
            if not _same(target, before[name]):
                target.copy_(before[name])
        raise
    return Swap(targets, before, digest(new))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, types and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return total.hexdigest()


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors of the state dict."""
    return dict(model.state_dict(keep_vars=True))


def _problems(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], whole: bool) -> list[str]:
    problems = [f"{name} is unknown" for name in tensors if name not in state]
    if whole:
        problems += [f"{name} is missing" for name in state if name not in tensors]
    for name, tensor in tensors.items():
        if name not in state:
            continue
        target = state[name]
        if tensor.shape != target.shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(target.shape)}")
        elif tensor.is_floating_point() != target.is_floating_point():
            problems.append(f"{name} is {tensor.dtype}, expected {target.dtype}")
        elif not tensor.is_floating_point() and not torch.equal(tensor.to(target.dtype).to(tensor.dtype), tensor):
            problems.append(f"{name} is {tensor.dtype} with values that {target.dtype} can't hold")
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            problems.append(f"{name} is not finite")
    return problems


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    return torch.equal(a.detach(), b) or (torch.equal(a.detach().isnan(), b.isnan()) and _equal_but_nan(a.detach(), b))


def _equal_but_nan(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else False
