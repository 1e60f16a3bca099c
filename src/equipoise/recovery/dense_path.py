"""A dense stand-in for a layer's experts: built beforehand, used when the experts can't be.

Merged from the experts, weighted by their load; or distilled on a little traffic, in closed form. It has the active
size of the layer, k experts. It approximates the experts' mean, not what the router knows about a token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equipoise.layer import FeedForward, MoE
from equipoise.layer.mode import Mode
from equipoise.ops.activation import activate, is_gated, pre_activation_dim
from equipoise.recovery.held import by_expert
from equipoise.recovery.overheard import Hear, overheard
from equipoise.types import ALONE, Held, Team

MAX_FITTED = 4096  # inner units: 128 MB in fp64, seconds to solve
MAX_FITTED_TOGETHER = 2**25  # the sum of their squares over layers: 256 MB in fp64; and time
NAME = "dense"  # in names of tensors: "layers.1.mlp.dense.down_proj.weight"


@dataclass(frozen=True, eq=False)
class _Stacked:
    """A layer's experts, of which several processes may hold parts."""

    layer: MoE
    name: str
    team: Team

    @property
    def held(self) -> Held:
        return self.team.held(self.name, self.layer.experts.num_experts)

    @property
    def mine(self) -> dict[int, int]:
        """The experts that this process speaks for, with their places here."""
        return {expert: place for place, expert in enumerate(self.held.ids) if self.held.owned[place]}


@torch.no_grad()
def merged(layer: MoE, counts_E: np.ndarray, name: str = "", team: Team = ALONE) -> FeedForward:
    """The experts' weights averaged by load, in k groups of like total load; one group is one slot of size F.

    counts_E: int64 (E,), the load to weigh by. The output of the slots is weighted by the groups' shares of the load.
    name: the layer's, where a team of several processes holds its experts.
    Raises ValueError for counts of another length.
    """
    stacked = _Stacked(layer, name, team)
    share_E = _shares(stacked, counts_E)
    _check_finite(stacked, share_E)
    mine = stacked.mine
    ups, downs = [], []
    for group in _even_groups(share_E, layer.k):
        weights = torch.tensor(share_E[group], dtype=torch.float32)
        part = weights / weights.sum().clamp_min(1e-12)
        up_HD, down_DF = (torch.zeros(shape, device=layer.experts.device) for shape in _shapes(layer))
        for expert, of_group, of_all in zip(group, part.tolist(), weights.tolist(), strict=True):
            if expert in mine:
                up, down = (each.float().nan_to_num() for each in layer.experts.weights_of(mine[expert]))
                up_HD += of_group * up  # 0 times what is not finite is not 0
                down_DF += of_all * down
        team.sum(up_HD)
        team.sum(down_DF)
        ups.append(up_HD)
        downs.append(down_DF)
    return _built(layer, torch.stack(ups), torch.cat(downs, dim=1))


@torch.no_grad()
def distilled(
    layers: Mapping[str, MoE],
    counts: Mapping[str, np.ndarray],
    run: Callable[[], object],
    *,
    ridge: float = 1e-3,
    team: Team = ALONE,
) -> dict[str, FeedForward]:
    """Inner units taken from the experts in proportion to their load, and an output projection fitted to traffic.

    counts: the load of each layer, which says how many units each expert gives. run: takes the model through tokens in
    eval, once; what the layers' experts read and return is the traffic. The fit is ridge regression in fp64, with ridge
    relative to the mean square of the features: exact, and no steps to tune. team: the processes that hold the layers;
    each runs through its share of the tokens.
    Raises ValueError when run does not reach a layer.
    """
    chosen = {name: _chosen_units(_Stacked(layer, name, team), counts[name]) for name, layer in layers.items()}
    sums = _moments(layers, chosen, run, team)
    paths = {}
    for name, layer in layers.items():
        gram, cross = sums[name]
        gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        paths[name] = _from_parts(layer, chosen[name], team.same(torch.linalg.solve(gram, cross)).t().float())
    return paths


def build_dense_paths(
    layers: Mapping[str, MoE],
    counts: Mapping[str, np.ndarray],
    run: Callable[[], object] | None = None,
    team: Team = ALONE,
) -> dict[str, FeedForward]:
    """A dense path for each layer that has no shared experts to stand in. counts: the load of each layer. Experts with
    biases get none: a block of ours has none to put them in.

    run: distil on this traffic; None merges. Stand-ins of more than MAX_FITTED inner units, or MAX_FITTED_TOGETHER in
    all layers, are merged all the same: a fit takes memory by the square of them, and time by the cube. team: as of
    `distilled`.
    """
    bare = {name: layer for name, layer in layers.items() if layer.shared is None and layer.experts.biases is None}
    fitted = {name: each for name, each in bare.items() if run is not None and _num_units(each) <= MAX_FITTED}
    if sum(_num_units(each) ** 2 for each in fitted.values()) > MAX_FITTED_TOGETHER:
        fitted = {}
    paths = {name: merged(layer, counts[name], name, team) for name, layer in bare.items() if name not in fitted}
    return paths | distilled(fitted, counts, run, team=team) if run is not None and fitted else paths


def dense_state(dense: Mapping[str, FeedForward]) -> dict[str, Tensor]:
    """Their weights by full name, to be kept beside the router's."""
    return {
        f"{layer}.{NAME}.{name}": tensor.clone()
        for layer, path in dense.items()
        for name, tensor in path.state_dict().items()
    }


def dense_from_state(layers: Mapping[str, MoE], state: Mapping[str, Tensor]) -> dict[str, FeedForward]:
    """The dense paths of which `dense_state` kept the weights. Raises ValueError for weights that do not fit."""
    found = {}
    for name, layer in layers.items():
        prefix = f"{name}.{NAME}."
        weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if not weights:
            continue
        down_DH = weights.get("down_proj.weight")
        if down_DH is None or down_DH.shape[0] != layer.experts.dim:
            raise ValueError(f"{prefix}: expected weights of a dense path of this layer, got {sorted(weights)}")
        path = _empty(layer, down_DH.shape[1])
        path.load_state_dict(weights)
        found[name] = path
    return found


@contextmanager
def diverted(layers: Mapping[str, MoE], dense: Mapping[str, FeedForward]) -> Iterator[None]:
    """Inside, the layers' experts are bypassed for every token: to measure what that costs."""
    before = {name: (layer.mode, layer.dense) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.set_mode(Mode(dense_share=1.0), dense.get(name))
        yield
    finally:
        for name, layer in layers.items():
            layer.set_mode(*before[name])


# ------------------------------------------------------------------------------------------------------- arithmetic


def _num_units(layer: MoE) -> int:
    """Inner units of its stand-in: k experts' worth."""
    return layer.k * layer.experts.hidden_dim


def _shapes(layer: MoE) -> tuple[tuple[int, int], tuple[int, int]]:
    """(H, D) and (D, F), of one expert."""
    experts = layer.experts
    D, F = experts.dim, experts.hidden_dim
    return (pre_activation_dim(F, experts.activation), D), (D, F)


def _check_finite(stacked: _Stacked, share_E: np.ndarray) -> None:
    """Raise ValueError, in all processes, where an expert with load has weights that are not finite."""
    experts, held = stacked.layer.experts, stacked.held
    broken_e = torch.zeros(len(held.ids), dtype=torch.int64, device=experts.device)
    for place, expert in enumerate(held.ids):
        if share_E[expert] > 0:
            broken_e[place] = not all(bool(torch.isfinite(each).all()) for each in experts.weights_of(place))
    for expert in by_expert(stacked.team, stacked.name, broken_e).nonzero()[:, 0].tolist():
        raise ValueError(
            f"merged: weights of expert {expert} are not finite; build stand-ins while experts are healthy"
        )


def _shares(stacked: _Stacked, counts_E: np.ndarray) -> np.ndarray:
    """float64 (E,), the load shares of the experts that have weights; even where nothing was counted."""
    layer, counts_E = stacked.layer, np.asarray(counts_E, dtype=np.float64)
    if counts_E.shape != (layer.num_experts,):
        raise ValueError(f"counts_E: expected {layer.num_experts} numbers, got shape {counts_E.shape}")
    total = counts_E.sum()
    share_E = counts_E / total if total > 0 else np.full(layer.num_experts, 1 / layer.num_experts)
    return share_E[: stacked.held.num_experts]


def _even_groups(share_E: np.ndarray, num_groups: int) -> list[list[int]]:
    """The experts in groups of like total load: the busiest first, each into the lightest group. None is empty."""
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    for expert in np.argsort(-share_E, kind="stable").tolist():
        lightest = min(groups, key=lambda group: (float(share_E[group].sum()) if group else -1.0, len(group)))
        lightest.append(expert)
    return groups


def _units(share_E: np.ndarray, num_units: int, per_expert: int) -> tuple[list[int], list[int]]:
    """(expert, unit) of num_units inner units: each expert's share of them by its load, its first ones, at most all."""
    wanted_E = np.minimum(np.floor(share_E * num_units).astype(int), per_expert)
    for expert in np.argsort(-share_E, kind="stable"):
        wanted_E[expert] += min(per_expert - wanted_E[expert], num_units - wanted_E.sum())
    chosen = [(expert, unit) for expert, count in enumerate(wanted_E.tolist()) for unit in range(count)]
    return [expert for expert, _ in chosen], [unit for _, unit in chosen]


def _chosen_units(stacked: _Stacked, counts_E: np.ndarray) -> Tensor:
    """fp32 (H, D), k F inner units of the experts, gates first where there are any."""
    layer, mine = stacked.layer, stacked.mine
    F, num_units = layer.experts.hidden_dim, _num_units(layer)
    counts = Counter(_units(_shares(stacked, counts_E), num_units, F)[0])
    halves = 2 if is_gated(layer.experts.activation) else 1
    chosen_HD = torch.zeros(halves * num_units, layer.experts.dim, device=layer.experts.device)
    place = 0
    for expert, count in counts.items():  # one after the other: all together may be more than fits
        if expert in mine:
            up_HD = layer.experts.weights_of(mine[expert])[0]
            for half in range(halves):
                at = half * num_units + place
                chosen_HD[at : at + count] = up_HD[half * F : half * F + count].float()
        place += count
    stacked.team.sum(chosen_HD)
    return chosen_HD


def _moments(
    layers: Mapping[str, MoE], chosen: Mapping[str, Tensor], run: Callable[[], object], team: Team
) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer, fp64: features by features and features by targets, over all tokens of run."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def adder(name: str, layer: MoE) -> Hear:
        def add(x_TD: Tensor, weight_T: Tensor, y_TD: Tensor) -> None:
            a_TH = activate(x_TD.float() @ chosen[name].t(), layer.experts.activation) * weight_T[:, None]
            new = (a_TH.t() @ a_TH).double(), (a_TH.t() @ y_TD.float()).double()
            old = sums.get(name)
            sums[name] = new if old is None else (old[0] + new[0], old[1] + new[1])

        return add

    with overheard(layers, {name: adder(name, layer) for name, layer in layers.items()}):
        run()
    if missing := sorted(set(layers) - set(sums)):
        raise ValueError(f"distilled: run() did not reach {', '.join(missing)}; let it call the model on some tokens")
    for name in layers:
        for total in sums[name]:
            team.sum(total)
    return sums


def _empty(layer: MoE, hidden_dim: int) -> FeedForward:
    experts = layer.experts
    with torch.device("meta"):  # no weights are drawn: a stand-in must not move a run's random numbers
        path = FeedForward(experts.dim, hidden_dim, experts.activation).to(dtype=experts.dtype)
    return path.to_empty(device=experts.device).requires_grad_(False).eval()


def _built(layer: MoE, up_gHD: Tensor, down_DH: Tensor) -> FeedForward:
    """From k slots of (H, D), each with its gates first, to one block, which has all gates first."""
    groups, H, D = up_gHD.shape
    halves = 2 if is_gated(layer.experts.activation) else 1
    up_HD = up_gHD.view(groups, halves, H // halves, D).transpose(0, 1).reshape(-1, D)
    return _from_parts(layer, up_HD, down_DH)


def _from_parts(layer: MoE, up_HD: Tensor, down_DH: Tensor) -> FeedForward:
    path = _empty(layer, down_DH.shape[1])
    up = path.gate_up_proj if is_gated(layer.experts.activation) else path.up_proj
    up.weight.copy_(up_HD)
    path.down_proj.weight.copy_(down_DH)
    return path
