"""Replace weights of a live model by verified ones: all of them or none, and back again.

In place: parameters and buffers stay the same objects, so optimizers and hooks keep them; an optimizer's own state is
not touched. It reads no files, and does not wait for running forwards (`Gate` does).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class Swap:
    """What was done, and the way back.

    changed: names whose values really differ. cast: names that came in another floating-point type than the model's.
    digest: of the new values, in the model's types.
    """

    def __init__(
        self, model: nn.Module, before: Mapping[str, Tensor], changed: Sequence[str], cast: Sequence[str], digest: str
    ) -> None:
        self._model, self._before = model, dict(before)
        self.changed, self.cast, self.digest = tuple(changed), tuple(cast), digest

    @torch.no_grad()
    def undo(self) -> None:
        """Put the old values back exactly, also after further training. Twice is once."""
        _put_back(_state(self._model), self._before)  # looked up anew: a model that moved has other buffer objects


@torch.no_grad()
def swap(model: nn.Module, tensors: Mapping[str, Tensor], *, whole: bool = False) -> Swap:
    """Copy the tensors into the model's parameters and buffers of these names.

    whole: every name of the model's state dict must be there. A cast between floating-point types is made, and named in
    `Swap.cast`; any other must be exact. Raises ValueError that lists what is wrong, and changes nothing, for unknown
    or missing names, other shapes, types that do not fit, values that are not finite, and tensors without dense values;
    whatever fails later, all is put back.
    """
    state, tensors = _state(model), _own_forms(model, tensors)
    if problems := _problems(state, tensors, whole):
        raise ValueError(f"swap: nothing was changed: {'; '.join(problems)}. Load weights of this very model")
    targets = {name: state[name] for name in tensors}
    new = _own(tensors, targets)
    before = {name: target.detach().clone() for name, target in targets.items()}
    try:
        for name, target in targets.items():
            target.copy_(new[name])
        if wrong := [name for name, target in targets.items() if not _same(target, new[name])]:
            raise RuntimeError(f"swap: {wrong[0]} does not hold what was copied into it; all was put back")
        changed = [name for name, target in targets.items() if not _same(target, before[name])]
        cast = [
            name for name in targets if tensors[name].is_floating_point() and tensors[name].dtype != new[name].dtype
        ]
        return Swap(model, before, changed, cast, digest(new))
    except BaseException:
        _put_back(targets, before)
        raise


def _own_forms(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights of modules that keep them in another form, such as quantised experts, in that form and its names.

    Such a module has `from_plain`, from tensors by their name in it to the same; it raises ValueError where it can't.
    """
    for name, module in model.named_modules():
        if (from_plain := getattr(module, "from_plain", None)) is None:
            continue
        prefix = f"{name}."
        plain = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if plain:
            others = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
            tensors = others | {f"{prefix}{key}": tensor for key, tensor in from_plain(plain).items()}
    return tensors


def _own(tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values to copy, of the targets' types. Views of the live weights (two of them exchanged) are copied first."""
    live = {target.untyped_storage().data_ptr() for target in targets.values()}
    new = {name: tensor.detach().to(targets[name]) for name, tensor in tensors.items()}
    return {name: t.clone() if t.untyped_storage().data_ptr() in live else t for name, t in new.items()}


def _put_back(targets: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """Undo copies, all that can be undone; those that never happened are not touched. Raises the first failure."""
    failures: list[Exception] = []
    for name, old in before.items():
        try:
            here = old.to(targets[name].device)  # the model may have moved
            if not _same(targets[name], here):
                targets[name].copy_(here)
        except Exception as error:  # one tensor that refuses must not keep the others from going back
            failures.append(error)
    if failures:
        raise failures[0]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, types and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name!r}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        total.update(_bytes(tensor).numpy().tobytes())
    return total.hexdigest()


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors of the state dict; a module's extra state, which is not a tensor, is none of them."""
    return {name: each for name, each in model.state_dict(keep_vars=True).items() if isinstance(each, Tensor)}


def _problems(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], whole: bool) -> list[str]:
    problems = [f"{name} is unknown" for name in tensors if name not in state]
    if whole:
        problems += [f"{name} is missing" for name in state if name not in tensors]
    misfits = {name: _misfit(state[name], tensor) for name, tensor in tensors.items() if name in state}
    return problems + [f"{name} {misfit}" for name, misfit in misfits.items() if misfit]


def _misfit(target: Tensor, tensor: Tensor) -> str:
    """Why the tensor can't be copied into the target; empty when it can."""
    if tensor.shape != target.shape:
        return f"has shape {tuple(tensor.shape)}, expected {tuple(target.shape)}"
    for where, each in (("", tensor), (" in the model", target)):
        if each.is_meta or each.layout != torch.strided:
            return f"has no dense values{where} ({each.layout} on {each.device})"
    if _kind(tensor) != _kind(target):
        return f"is {tensor.dtype}, expected {target.dtype}"
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        if not is_finite(tensor):
            return "is not finite"
        fits = is_finite(tensor.to(target.dtype))
    else:
        fits = torch.equal(tensor.to(target.dtype).to(tensor.dtype), tensor)
    return "" if fits else f"is {tensor.dtype} with values that {target.dtype} can't hold"


def _kind(tensor: Tensor) -> str:
    return "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else "integer"


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are; those of integers always."""
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # torch.isfinite does not know float8
    return bool(torch.isfinite(tensor).all())


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit: NaN is itself, and -0.0 is not 0.0."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
