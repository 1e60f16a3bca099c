"""What must hold for any size, router and distribution of tokens, edge cases included."""

from dataclasses import dataclass

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from equipoise.layer import Capacity, MoE
from equipoise.routing import TopK

D, F = 8, 8  # whole 16 bytes in every dtype, for the grouped backend
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}  # relative to the largest number of a tensor


@dataclass(frozen=True)
class Case:
    T: int
    E: int
    k: int
    capacity: Capacity | None = None
    tokens: str = "random"  # "one expert": all tokens alike; "starved": the last experts are out of reach
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def layer(self, **kwargs) -> MoE:
        torch.manual_seed(self.seed)
        layer = MoE(D, F, self.E, router=TopK(k=self.k), capacity=self.capacity, **kwargs)
        layer.init_weights(0.5, 0.5)
        if self.tokens == "starved" and self.k < self.E:
            with torch.no_grad():
                layer.router.weight[self.k :] = 0
                layer.router.weight[self.k :, 0] = -50.0  # x[:, 0] is positive
        return layer.to(self.dtype)

    def x(self) -> torch.Tensor:
        torch.manual_seed(self.seed + 1)
        x = torch.randn(self.T, D)
        x[:, 0] = x[:, 0].abs() + 1
        if self.tokens == "one expert" and self.T:
            x = x[:1].expand(self.T, D).clone()
        return x.to(self.dtype).requires_grad_()

    def run(self, **kwargs) -> dict[str, torch.Tensor]:
        """The output and every gradient of one training forward and backward."""
        layer, x = self.layer(**kwargs), self.x()
        torch.manual_seed(self.seed + 2)  # for random drops
        y = layer(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(self.dtype))
        return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


@st.composite
def cases(draw, capacity: bool = True, dtypes=tuple(TOLERANCE)) -> Case:
    E = draw(st.integers(1, 6))
    capacities = st.builds(
        Capacity, st.sampled_from([0.25, 0.5, 1.0, 1.25, 4.0]), st.sampled_from(["position", "probability", "random"])
    )
    return Case(
        T=draw(st.sampled_from([0, 1, 2, 3, 9])),
        E=E,
        k=draw(st.integers(1, E)),
        capacity=draw(st.none() | capacities) if capacity else None,
        tokens=draw(st.sampled_from(["random", "one expert", "starved"])),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 1000)),
    )


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        assert actual[name] is not None, name
        assert actual[name].shape == value.shape, name
        if value.numel():
            error = (actual[name] - value).abs().max() / value.abs().max().clamp_min(1e-2)
            assert error.item() <= tolerance, (name, error.item())


@example(Case(T=0, E=4, k=2))
@example(Case(T=1, E=1, k=1))
@example(Case(T=0, E=1, k=1, capacity=Capacity(1.0)))
@example(Case(T=5, E=4, k=4, capacity=Capacity(0.25)))
@settings(max_examples=40)
@given(case=cases())
def test_backends_agree_forward_and_backward(case):
    reference = case.run(backend="reference")
    if (
        case.dtype == torch.bfloat16
    ):  # the router's gradient is a difference of like numbers: all rounding, case by case
        reference = {name: reference[name] for name in reference if name == "y" or name.startswith("experts")}
    for backend in ("lean", "grouped"):
        assert_same(case.run(backend=backend), reference, TOLERANCE[case.dtype])


@example(Case(T=0, E=4, k=2), "grouped")
@given(case=cases(dtypes=(torch.float32,)), backend=st.sampled_from(["lean", "grouped", "reference"]))
def test_experts_without_tokens_get_zero_gradients(case, backend):
    layer, x, seen = case.layer(backend=backend), case.x(), []
    layer.tap.register_forward_hook(lambda module, args, routed: seen.append(routed.plan.counts_e))
    layer(x).sum().backward()
    idle = seen[0] == 0
    assert case.tokens != "starved" or idle[case.k :].all()
    for parameter in (layer.experts.up, layer.experts.down_proj):
        assert parameter.grad is not None
        assert not parameter.grad[idle].any()
        assert parameter.grad.isfinite().all()
    assert layer.router.weight.grad is not None


@given(case=cases(capacity=False, dtypes=(torch.float32,)), shuffle=st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_the_output_when_dropless(case, shuffle):
    layer, x = case.layer(), case.x().detach()
    order = list(range(case.T))
    shuffle.shuffle(order)
    torch.testing.assert_close(layer(x[order]), layer(x)[order], rtol=1e-5, atol=1e-6)


@given(case=cases(dtypes=(torch.float32,)), backend=st.sampled_from(["lean", "grouped"]))
def test_the_same_seed_gives_the_same_bits(case, backend):
    one, two = case.run(backend=backend), case.run(backend=backend)
    assert all(torch.equal(one[name], two[name]) for name in one)
