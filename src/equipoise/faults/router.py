"""Faults of a router: of its weight, and of the selection bias of a balancer.

All are written into tensors that training goes on with, as a bad update would. The optimizer's moments are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from equipoise.faults.edit import Edit
from equipoise.faults.injection import Change, Run, check_positive, check_seed, team_of
from equipoise.faults.targets import Target, check_expert, find, tensor_at


@dataclass(frozen=True)
class Collapse:
    """One layer's router comes to prefer one expert for every token, or a few.

    Imitates a bad update that feeds on itself. Written into the router's weight: the row of `expert` moves along the
    direction whose product with the layer's inputs is nearest to 1 for all tokens, so that its logit rises by about
    `intensity`. layer: the layer's name in the model. expert: its index. also: further experts that rise equally.
    intensity: in logits; 10 saturates a softmax. Taken out: the row gets its bits back, or what was added is subtracted
    from those that training has moved.
    """

    layer: str
    expert: int
    intensity: float = 10.0
    also: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_positive("Collapse.intensity", self.intensity)
        _check_also("Collapse", self.expert, self.also)

    def put_in(self, model: nn.Module, run: Run | None) -> Change:
        """Add the change to the rows."""
        edit, change_D = _along_the_inputs(model, self, (self.expert, *self.also), run)
        _put(edit, self, lambda clean, still: clean + (self.intensity * change_D).to(clean))
        return Change(edit.take_out)


@dataclass(frozen=True)
class Drift:
    """A slow drift into collapse: the change of `Collapse`, in equal parts over `steps` calls of `advance`.

    Imitates a layer that tips over unnoticed. At the injection nothing changes; further calls do nothing. The direction
    is that of the inputs at the injection. Taken out as `Collapse`, however far it has come.
    """

    layer: str
    expert: int
    intensity: float = 10.0
    steps: int = 100
    also: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_positive("Drift.intensity", self.intensity)
        if self.steps < 1:
            raise ValueError(f"Drift.steps: expected at least 1, got {self.steps}")
        _check_also("Drift", self.expert, self.also)

    def put_in(self, model: nn.Module, run: Run | None) -> Change:
        """Measure the direction, and be ready to move."""
        edit, change_D = _along_the_inputs(model, self, (self.expert, *self.also), run)
        _check_holds(edit, self, lambda clean, still: clean + (self.intensity * change_D).to(clean))
        done = since = 0  # steps in all, and since the change was last found missing

        def advance() -> None:
            def moved(clean: Tensor, still: bool) -> Tensor:
                nonlocal since
                since = since + 1 if still else 1
                return clean + (self.intensity * since / self.steps * change_D).to(clean)

            nonlocal done
            if done < self.steps:
                edit.put(moved)
                done += 1

        return Change(edit.take_out, advance)


@dataclass(frozen=True)
class DeadExpert:
    """An expert's logit falls for every token, so that nobody chooses it.

    Imitates an expert that lost the competition early and cannot come back. Written as `Collapse` is, downwards.
    intensity: in logits. Taken out as `Collapse`.
    """

    layer: str
    expert: int
    intensity: float = 30.0

    def __post_init__(self) -> None:
        check_positive("DeadExpert.intensity", self.intensity)

    def put_in(self, model: nn.Module, run: Run | None) -> Change:
        """Subtract the change from the row."""
        edit, change_D = _along_the_inputs(model, self, (self.expert,), run)
        _put(edit, self, lambda clean, still: clean - (self.intensity * change_D).to(clean))
        return Change(edit.take_out)


@dataclass(frozen=True)
class LogitBlowUp:
    """The router's weight is multiplied by `intensity`.

    Imitates logits that grow until the softmax saturates: probabilities become 0 and 1, gradients vanish. Who is chosen
    stays the same. Taken out: the weight gets its bits back; elements that training has moved are divided by
    `intensity`.
    """

    layer: str
    intensity: float = 30.0

    def __post_init__(self) -> None:
        check_positive("LogitBlowUp.intensity", self.intensity)

    def put_in(self, model: nn.Module, run: Run | None) -> Change:
        """Multiply."""
        edit, _ = _weight_rows(find(model, "LogitBlowUp", self.layer), "LogitBlowUp", None, self._divided)
        _put(edit, self, lambda clean, still: self.intensity * clean)
        return Change(edit.take_out)

    def _divided(self, now: Tensor, clean: Tensor, left: Tensor) -> Tensor:
        return now / self.intensity


@dataclass(frozen=True)
class RouterCorruption:
    """Noise of `intensity` times the weight's own standard deviation is added to the router's weight.

    Imitates a router that was damaged in memory or in a reload: it chooses by other directions than it has learnt.
    seed: of the noise. Taken out: the weight gets its bits back, or the noise is subtracted from what training has
    moved.
    """

    layer: str
    intensity: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("RouterCorruption.intensity", self.intensity)
        check_seed("RouterCorruption", self.seed)

    def put_in(self, model: nn.Module, run: Run | None) -> Change:
        """Draw and add."""
        edit, weight_ED = _weight_rows(find(model, "RouterCorruption", self.layer), "RouterCorruption", None)
        noise_ED = torch.randn(weight_ED.shape, generator=torch.Generator().manual_seed(self.seed))
        change_ED = self.intensity * float(weight_ED.float().std(unbiased=False)) * noise_ED
        _put(edit, self, lambda clean, still: clean + change_ED.to(clean))
        return Change(edit.take_out)


@dataclass(frozen=True)
class BiasRunaway:
    """A balancer's selection bias of one expert runs away by `intensity`.

    Imitates a balancer that pushes the wrong way: tokens are sent to the expert though the router does not prefer it.
    Written into `balancer.bias_E`, or the correction bias of DeepSeek-V3 and its kin; intensity: in units of what the
    bias is added to, scores or logits. A balancer that works moves it back, slowly. Taken out: the bias gets its bits
    back, or what was added is subtracted from what the balancer has moved; a bias that is back already stays.
    """

    layer: str
    expert: int
    intensity: float = 10.0

    def __post_init__(self) -> None:
        check_positive("BiasRunaway.intensity", self.intensity)

    def put_in(self, model: nn.Module, run: Run | None) -> Change:
        """Add."""
        target = find(model, "BiasRunaway", self.layer)
        check_expert("BiasRunaway.expert", target, self.expert)
        place = target.selection_bias()
        if place is None:
            raise ValueError(
                f"BiasRunaway.layer: expected a layer with a selection bias, {self.layer} has none; build it with "
                "balance=(BiasBalance(),), or take Collapse"
            )
        edit = Edit(lambda: tensor_at(*place), torch.tensor([self.expert]))
        _put(edit, self, lambda clean, still: clean + self.intensity)
        return Change(edit.take_out)


# ------------------------------------------------------------------------------------------------------------ parts

Fault: TypeAlias = Collapse | Drift | DeadExpert | LogitBlowUp | RouterCorruption | BiasRunaway


def constant_direction(x_TD: Tensor, ridge: float = 1e-3) -> Tensor:
    """w (D,) fp32 with x w as near to 1 as it gets for every row: ridge regression, ridge relative to mean x^2."""
    x_TD = x_TD.double()
    T, D = x_TD.shape
    gram_DD = x_TD.t() @ x_TD / T
    ridge_DD = ridge * gram_DD.diagonal().mean() * torch.eye(D, dtype=x_TD.dtype, device=x_TD.device)
    direction_D: Tensor = torch.linalg.solve(gram_DD + ridge_DD, x_TD.mean(0))
    return direction_D.float()


def _put(edit: Edit, fault: Fault, change: Callable[[Tensor, bool], Tensor]) -> None:
    _check_holds(edit, fault, change)
    edit.put(change)


def _check_holds(edit: Edit, fault: Fault, change: Callable[[Tensor, bool], Tensor]) -> None:
    """Raise ValueError when the tensor would become infinite: no gradient leads back, and nothing takes it out."""
    if not edit.holds(change):
        raise ValueError(
            f"{type(fault).__name__}.intensity: expected a number that leaves {fault.layer} finite, got "
            f"{fault.intensity:g}; lower it"
        )


def _check_also(owner: str, expert: int, also: tuple[int, ...]) -> None:
    if len({expert, *also}) < 1 + len(also):
        raise ValueError(f"{owner}.also: expected other experts than {expert}, each once, got {also}")


def _along_the_inputs(
    model: nn.Module, fault: Collapse | Drift | DeadExpert, experts: tuple[int, ...], run: Run | None
) -> tuple[Edit, Tensor]:
    """(the experts' rows of the router's weight, direction (D,) that changes every token's logit by about 1)."""
    owner = type(fault).__name__
    target = find(model, owner, fault.layer)
    check_expert(f"{owner}.expert", target, experts[0])
    for expert in experts[1:]:
        check_expert(f"{owner}.also", target, expert)
    edit, _ = _weight_rows(target, owner, experts)
    return edit, constant_direction(_router_inputs(model, target, owner, run))


def _weight_rows(target: Target, owner: str, experts: tuple[int, ...] | None, undo: Any = None) -> tuple[Edit, Tensor]:
    """(an edit of rows of the router's weight, all for None; the weight (E, D) as it is)."""
    place = target.router_weight()
    if place is None:
        raise ValueError(f"{owner}.layer: the router of {target.name} has no weight to break; choose another layer")
    rows = torch.tensor(range(target.num_experts) if experts is None else experts)
    edit = Edit(lambda: tensor_at(*place), rows, undo) if undo else Edit(lambda: tensor_at(*place), rows)
    return edit, tensor_at(*place).detach()


def _router_inputs(model: nn.Module, target: Target, owner: str, run: Run | None) -> Tensor:
    """(T, D): what the layer's router sees while `run` runs."""
    if run is None:
        raise ValueError(f"{owner}: inject needs run, a call that takes the model through a batch of tokens, got None")
    assert target.router is not None
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        seen.append(x.detach().reshape(-1, x.shape[-1]))

    handle = target.router.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), _in_eval(model):
            run()
    finally:
        handle.remove()
    if not seen:
        raise ValueError(
            "inject: run() did not reach the layer; let it call the model on a batch of tokens (while a repair sends "
            "tokens round robin, the router is not asked)"
        )
    return team_of(run).same(torch.cat(seen))  # ranks see the same but for the last bits, and routers must stay equal


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
