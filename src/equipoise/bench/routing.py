"""What deciding costs: routing and dispatch planning beside the whole layer.

Ratios within one run, of forward and backward together: against the layer, the number of experts, the number of
tokens, what is done with overflow, and router against router. Losses, balancers and the monitor are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.bench.harness import Effort, Variant, in_sections, ratio, spread, time_side_by_side
from equipoise.bench.problem import SHAPES, Shape
from equipoise.bench.report import Cell, Table
from equipoise.layer import Capacity, MoE
from equipoise.layer.admission import Admission, Capped, Dropless
from equipoise.layer.dispatch import plan_of
from equipoise.ops.count import count_assignments
from equipoise.ops.router_linear import router_linear
from equipoise.routing import ROUTERS, ReLURouting, TopK
from equipoise.routing.router import Router
from equipoise.types import Routed, RoutingDecision

FACTOR = 1.25  # of the capacity
MAX_VIOLATION = 1.0  # of the imbalanced router: its busiest expert has twice the mean load


@dataclass(frozen=True)
class Sizes:
    """What is measured. tokens, shape: where a table does not vary them. fill: least seconds per round and part."""

    tokens: int
    shape: Shape
    layers: tuple[Shape, ...]
    num_experts: tuple[int, ...]
    num_tokens: tuple[int, ...]
    fill: float


FULL = Sizes(
    tokens=4096,
    shape=Shape("routing", dim=1024, hidden_dim=256, num_experts=64, top_k=2),
    layers=(Shape("coarse", dim=1024, hidden_dim=2048, num_experts=64, top_k=2), SHAPES["fine"]),
    num_experts=(8, 64, 256, 512),
    num_tokens=(1024, 2048, 4096, 8192, 16384),
    fill=0.05,
)
SMOKE = Sizes(
    tokens=128,
    shape=Shape("routing", dim=32, hidden_dim=16, num_experts=16, top_k=2),
    layers=(Shape("coarse", 32, 64, 8, 2), Shape("fine", 32, 16, 16, 4)),
    num_experts=(4, 16),
    num_tokens=(64, 128),
    fill=0.0,
)


# ---------------------------------------------------------------------------------------------- what is timed


@dataclass(frozen=True, eq=False)
class Tokens:
    """x_TD: normal, but its first feature is 1, through which a router's weight can favour experts. ids_T: random."""

    x_TD: Tensor
    ids_T: Tensor

    @staticmethod
    def draw(num_tokens: int, dim: int, dtype: torch.dtype) -> Tokens:
        """New ones, which take a gradient."""
        x_TD = torch.empty(num_tokens, dim, dtype=dtype, requires_grad=True)
        tokens = Tokens(x_TD, torch.randint(2**15, (num_tokens,)))
        tokens.renew()
        return tokens

    @torch.no_grad()
    def renew(self) -> None:
        """Other numbers, without a gradient: no expert gets the same number of rows twice."""
        self.x_TD.normal_()
        self.x_TD[:, 0] = 1
        self.x_TD.grad = None


def variant(name: str, run: Callable[[], object], module: nn.Module, tokens: Tokens) -> Variant:
    """A run gets new tokens, and comes after another run of the same variant, as in `bench layer`."""

    def reset() -> None:
        for warm in (True, False):
            module.zero_grad(set_to_none=True)
            tokens.renew()
            if warm:
                run()

    return Variant(name, run, reset)


def weight_of(router: Router) -> Tensor:
    """Of its linear. A router without one is not asked."""
    assert router.weight is not None
    return router.weight


def run_layer(layer: MoE, tokens: Tokens, grad_TD: Tensor) -> None:
    """The whole layer."""
    torch.autograd.backward(layer(tokens.x_TD), grad_TD)


def run_linear(router: Router, tokens: Tokens, grad_TE: Tensor) -> None:
    """The router's matrix product alone."""
    torch.autograd.backward(router_linear(tokens.x_TD, weight_of(router)), grad_TE)


def run_routing(router: Router, tokens: Tokens) -> None:
    """The decision. Backward starts at the combine weights, where there is a gradient at all."""
    weights_N = router(tokens.x_TD, None, tokens.ids_T).weights_N
    if weights_N.requires_grad:
        torch.autograd.backward(weights_N, weights_N.detach())


def run_dispatch(admission: Admission, decision: RoutingDecision) -> None:
    """The plan of a decision that was made, and the way back to its weights."""
    plan = plan_of(admission.admit(decision, True))
    torch.autograd.grad(plan.weights_R, decision.weights_N, plan.weights_R.detach())


def run_both(router: Router, admission: Admission, tokens: Tokens) -> None:
    """The decision and its plan."""
    plan = plan_of(admission.admit(router(tokens.x_TD, None, tokens.ids_T), True))
    torch.autograd.backward(plan.weights_R, plan.weights_R.detach())


# ---------------------------------------------------------------------------------------------- routers


def build_router(config: Any, shape: Shape, dtype: torch.dtype) -> Router:
    """The router in training, its first feature's weights at 0 and the others normal."""
    router: Router = config.build(shape.dim, shape.num_experts).to(dtype).train()
    if router.weight is not None:
        nn.init.normal_(router.weight, std=0.02)
        favour(router, torch.zeros(shape.num_experts))
    return router


@torch.no_grad()
def favour(router: Router, logits_E: Tensor) -> None:
    """Add logits_E to every token's logits."""
    weight_of(router)[:, 0] = logits_E


@torch.no_grad()
def imbalance(router: Router, tokens: Tokens, max_violation: float) -> float:
    """Let each expert have a higher logit than the one before, so far that the busiest has about 1 + max_violation
    times the mean load. Returns the violation that is reached."""
    num_experts = len(weight_of(router))
    slope_E = torch.linspace(-1, 1, num_experts)
    low, high, reached = 0.0, 16.0, 0.0
    for _ in range(12):
        middle = (low + high) / 2
        favour(router, middle * slope_E)
        counts_E = count_assignments(router(tokens.x_TD).expert_ids_N, num_experts).double()
        reached = float(counts_E.max() / counts_E.mean() - 1)
        low, high = (middle, high) if reached < max_violation else (low, middle)
    return reached


@torch.no_grad()
def make_sparse(router: Router, tokens: Tokens, k: int) -> None:
    """Lower all logits until about k of each token's are positive: ReLU routing as trained, not as drawn."""
    logits_TE = router_linear(tokens.x_TD, weight_of(router))
    num_experts = logits_TE.shape[1]
    threshold = logits_TE.flatten().kthvalue(max(1, logits_TE.numel() * (num_experts - k) // num_experts)).values
    favour(router, -threshold.expand(num_experts))


# ---------------------------------------------------------------------------------------------- tables


def layer_table(shape: Shape, sizes: Sizes, dtype: torch.dtype, effort: Effort) -> Table:
    """Shares of the layer."""
    layer = MoE(shape.dim, shape.hidden_dim, shape.num_experts, router=TopK(k=shape.top_k)).to(dtype).train()
    router, admission = layer.router, layer.admission
    tokens = Tokens.draw(sizes.tokens, shape.dim, dtype)
    with torch.no_grad():
        decision = router(tokens.x_TD)
    decision.weights_N.requires_grad_()
    parts: dict[str, Callable[[], object]] = {
        "whole layer": partial(run_layer, layer, tokens, torch.randn(sizes.tokens, shape.dim, dtype=dtype)),
        "routing + dispatch": partial(run_both, router, admission, tokens),
        "routing": partial(run_routing, router, tokens),
        "of it, the linear": partial(run_linear, router, tokens, torch.randn(sizes.tokens, shape.num_experts)),
        "dispatch": partial(run_dispatch, admission, decision),
    }
    variants = [variant(name, run, layer, tokens) for name, run in parts.items()]
    seconds = time_side_by_side(variants, effort.filling(sizes.fill))
    rows = tuple(
        (name, spread(times).times(1e3), ratio(seconds, name, "whole layer").times(100))
        for name, times in seconds.items()
    )
    return Table(
        f"share, {shape.name}: {_described(shape, sizes.tokens)} F={shape.hidden_dim}",
        ("forward + backward", "ms", "share of the layer [%]"),
        rows,
        "Aim: routing + dispatch at most 5 %.",
    )


def share_tables(sizes: Sizes, dtype: torch.dtype, effort: Effort) -> list[Table]:
    """Routing and dispatch against the layer."""
    return [layer_table(shape, sizes, dtype, effort) for shape in sizes.layers]


def expert_tables(sizes: Sizes, dtype: torch.dtype, effort: Effort) -> list[Table]:
    """Routing and dispatch against the number of experts, the linear apart: its arithmetic grows with E."""
    shape = sizes.shape
    tokens = Tokens.draw(sizes.tokens, shape.dim, dtype)
    variants = []
    for num_experts in sizes.num_experts:
        router = build_router(TopK(k=shape.top_k), replace(shape, num_experts=num_experts), dtype)
        grad_TE = torch.randn(sizes.tokens, num_experts)
        variants += [
            variant(f"all {num_experts}", partial(run_both, router, Dropless(), tokens), router, tokens),
            variant(f"linear {num_experts}", partial(run_linear, router, tokens, grad_TE), router, tokens),
        ]
    seconds = dict(time_side_by_side(variants, effort.filling(sizes.fill)))
    fewest, rows = sizes.num_experts[0], []
    for num_experts in sizes.num_experts:
        pairs = zip(seconds[f"all {num_experts}"], seconds[f"linear {num_experts}"], strict=True)
        seconds[f"rest {num_experts}"] = tuple(both - linear for both, linear in pairs)
        cells: list[Cell] = [f"E={num_experts}"]
        for part in ("all", "linear", "rest"):
            name = f"{part} {num_experts}"
            cells += [spread(seconds[name]).times(1e3), ratio(seconds, name, f"{part} {fewest}")]
        rows.append(tuple(cells))
    base = f"/ E={fewest}"
    columns = ("experts", "routing + dispatch [ms]", base, "linear [ms]", f"linear {base}", "rest [ms]", f"rest {base}")
    note = "rest: routing + dispatch less the linear, round by round. Aim: the rest at most 1.3 times that of E=8."
    return [Table(f"experts: T={sizes.tokens} D={shape.dim} K={shape.top_k}", columns, tuple(rows), note)]


def token_tables(sizes: Sizes, dtype: torch.dtype, effort: Effort) -> list[Table]:
    """Time per token against the number of tokens."""
    shape = sizes.shape
    tables = []
    for name, admission in (("dropless", Dropless()), ("next_choice", Capped(NEXT_CHOICE))):
        variants = []
        for num_tokens in sizes.num_tokens:
            router, tokens = build_router(TopK(k=shape.top_k), shape, dtype), Tokens.draw(num_tokens, shape.dim, dtype)
            imbalance(router, tokens, MAX_VIOLATION)
            variants.append(variant(str(num_tokens), partial(run_both, router, admission, tokens), router, tokens))
        seconds = time_side_by_side(variants, effort.filling(sizes.fill))
        fewest = sizes.num_tokens[0]
        rows = tuple(
            (
                f"T={num_tokens}",
                spread(seconds[str(num_tokens)]).times(1e3),
                spread(seconds[str(num_tokens)]).times(1e6 / num_tokens),
                ratio(seconds, str(num_tokens), str(fewest)).times(fewest / num_tokens),
            )
            for num_tokens in sizes.num_tokens
        )
        columns = ("routing + dispatch", "ms", "µs per token", f"per token / T={fewest}")
        title = f"tokens, {name}: D={shape.dim} E={shape.num_experts} K={shape.top_k}"
        tables.append(Table(title, columns, rows, "Linear in T: the last column stays at 1 or falls."))
    return tables


NEXT_CHOICE = Capacity(FACTOR, overflow="next_choice")
OVERFLOW = {  # name: (capacity, shared experts)
    "dropless": (None, 0),
    "drop": (Capacity(FACTOR), 0),
    "next_choice": (NEXT_CHOICE, 0),
    "dropless, shared expert": (None, 1),
    "shared": (Capacity(FACTOR, overflow="shared"), 1),
}


def overflow_tables(sizes: Sizes, dtype: torch.dtype, effort: Effort) -> list[Table]:
    """What is done with overflow, on the whole layer, with an imbalanced router."""
    shape = next(shape for shape in sizes.layers if shape.name == "fine")
    tokens = Tokens.draw(sizes.tokens, shape.dim, dtype)
    router = build_router(TopK(k=shape.top_k), shape, dtype)
    violation = imbalance(router, tokens, MAX_VIOLATION)
    grad_TD = torch.randn(sizes.tokens, shape.dim, dtype=dtype)
    sizes_of = (shape.dim, shape.hidden_dim, shape.num_experts)
    layers = {}
    for name, (capacity, shared_experts) in OVERFLOW.items():
        layer = MoE(*sizes_of, router=TopK(k=shape.top_k), capacity=capacity, shared_experts=shared_experts)
        layer.router.load_state_dict(router.state_dict())
        layers[name] = layer.to(dtype).train()
    fates = {name: fate(layer, tokens) for name, layer in layers.items()}
    variants = [
        variant(name, partial(run_layer, layer, tokens, grad_TD), layer, tokens) for name, layer in layers.items()
    ]
    seconds = time_side_by_side(variants, effort)
    rows = tuple(
        (
            name,
            spread(times).times(1e3),
            ratio(seconds, name, "dropless, shared expert" if OVERFLOW[name][1] else "dropless"),
            ratio(seconds, name, "drop"),
            *fates[name],
        )
        for name, times in seconds.items()
    )
    columns = ("forward + backward", "ms", "time / dropless", "time / drop", "computed [%]", "moved or spilled [%]")
    note = (
        f"Router with MaxVio {violation:.2f}, capacity factor {FACTOR}. dropless: that with as many shared experts. "
        "next_choice computes what drop loses, so what moving costs is its time / dropless. Aim: at most 1.1."
    )
    return [Table(f"overflow: {_described(shape, sizes.tokens)} F={shape.hidden_dim}", columns, rows, note)]


@torch.no_grad()
def fate(layer: MoE, tokens: Tokens) -> tuple[float, float]:
    """(% of the assignments that experts compute, % that were moved or spilled)."""
    seen: list[Routed] = []
    handle = layer.tap.register_forward_hook(lambda module, args, routed: seen.append(routed))
    layer(tokens.x_TD)
    handle.remove()
    (routed,) = seen
    percent = 100 / len(routed.decision.expert_ids_N)
    elsewhere = sum(int(routed.plan.drops.get(reason, 0)) for reason in ("moved", "spilled"))
    return percent * int(routed.plan.counts_e.sum()), percent * elsewhere


def router_tables(sizes: Sizes, dtype: torch.dtype, effort: Effort) -> list[Table]:
    """Every router beside TopK."""
    shape = sizes.shape
    tokens = Tokens.draw(sizes.tokens, shape.dim, dtype)
    variants, per_token = [], {}
    for strategy in ROUTERS:
        takes_k = "k" in {field.name for field in fields(strategy)}
        router = build_router(strategy(k=shape.top_k) if takes_k else strategy(), shape, dtype)
        if strategy is ReLURouting:
            make_sparse(router, tokens, shape.top_k)
        with torch.no_grad():
            num_assignments = len(router(tokens.x_TD, None, tokens.ids_T).expert_ids_N)
        per_token[strategy.__name__] = num_assignments / sizes.tokens
        variants.append(variant(strategy.__name__, partial(run_routing, router, tokens), router, tokens))
    seconds = time_side_by_side(variants, effort.filling(sizes.fill))
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (name, spread(times).times(1e3), ratio(seconds, name, "TopK"), per_token[name])
        for name, times in seconds.items()
    )
    columns = ("routing", "ms", "time / TopK", "assignments per token")
    note = (
        f"Forward and backward of the router in training, linear included, k={shape.top_k} (Switch: 1), other options "
        "at their defaults. Hash has no linear and nothing to go back to. ReLURouting is as sparse as after training."
    )
    return [Table(f"routers: {_described(shape, sizes.tokens)}", columns, rows, note)]


def _described(shape: Shape, num_tokens: int) -> str:
    return f"T={num_tokens} D={shape.dim} E={shape.num_experts} K={shape.top_k}"


SECTIONS: dict[str, Callable[[Sizes, torch.dtype, Effort], Sequence[Table]]] = {
    "share": share_tables,
    "experts": expert_tables,
    "tokens": token_tables,
    "overflow": overflow_tables,
    "routers": router_tables,
}


def measure(sizes: Sizes, dtype: torch.dtype, effort: Effort, only: tuple[str, ...] = ()) -> Iterator[Table | str]:
    """The tables of each section. Raises ValueError for a section that is not there."""
    yield from in_sections({name: partial(each, sizes, dtype) for name, each in SECTIONS.items()}, effort, only)
