"""torch.compile without graph breaks gives the eager numbers; the meta device constructs and runs."""

import pytest
import torch

from equipoise.layer import Capacity, MoE, reduce_and_update
from equipoise.routing import BiasBalance, QuantileBalance, Switch, SwitchLoss, TopK, ZLoss

# PyTorch's own deprecations inside its compiler: it makes an instance of each Function, and scripts a method.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]

BALANCES = {
    "losses": (SwitchLoss(0.1, "sequence"), SwitchLoss(0.1, "global"), ZLoss(0.1)),
    "sign": (BiasBalance(), SwitchLoss(0.1)),
    "smooth": (BiasBalance(rule="smooth"), ZLoss(0.1)),
    "quantile": (QuantileBalance(), ZLoss(0.1)),
}
CAPACITIES = {"dropless": None, "position": Capacity(0.7), "probability": Capacity(0.7, "probability")}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def pair(**kwargs) -> tuple[MoE, MoE]:
    """Two layers with the same weights."""
    one, two = MoE(8, 8, 4, **kwargs), MoE(8, 8, 4, **kwargs)
    one.init_weights(0.5, 0.5)
    two.load_state_dict(one.state_dict())
    return one, two


def assert_compiles_to_the_same(eager: MoE, layer: MoE, backend: str, lengths: tuple[int, ...] = (10, 10)) -> None:
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for S in lengths:
        x = torch.randn(2, S, 8)
        results = []
        for run, module in ((eager, eager), (compiled, layer)):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = run(leaf)
            y.square().sum().backward()
            results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters())])
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
        if layer.balancer is not None:
            assert torch.equal(layer.balancer.pending, eager.balancer.pending)
            reduce_and_update([eager, layer])
            assert torch.equal(layer.balancer.bias_E, eager.balancer.bias_E)


@pytest.mark.parametrize(
    ("balance", "capacity"),
    [("losses", "position"), ("sign", "dropless"), ("smooth", "dropless"), ("quantile", "probability")],
)
def test_compiled_equals_eager(balance, capacity):
    layers = pair(balance=BALANCES[balance], capacity=CAPACITIES[capacity], shared_experts=1, shared_gate=True)
    assert_compiles_to_the_same(*layers, "aot_eager")


@pytest.mark.parametrize(
    ("router", "backend"),
    [
        (Switch(jitter=0.0), "grouped"),
        (TopK(k=2, score="sigmoid", num_groups=2, top_groups=1), "lean"),
        (TopK(k=3, order="post"), "lean"),
    ],
    ids=["switch", "groups", "post"],
)
def test_compiled_routers_equal_eager(router, backend):
    assert_compiles_to_the_same(*pair(router=router, backend=backend), "aot_eager")


def test_compiled_takes_batches_of_any_length():
    layers = pair(balance=BALANCES["sign"], capacity=CAPACITIES["position"])
    assert_compiles_to_the_same(*layers, "aot_eager", lengths=(10, 7, 12))  # from the second on, sizes are unknown


def test_compiled_eval_equals_eager():
    eager, layer = pair(balance=BALANCES["sign"], capacity=CAPACITIES["position"])
    x = torch.randn(2, 10, 8)
    with torch.no_grad():
        compiled = torch.compile(layer.eval(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), eager.eval()(x))


@pytest.mark.slow
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("balance", BALANCES)
def test_inductor_equals_eager(balance, capacity):
    layers = pair(balance=BALANCES[balance], capacity=CAPACITIES[capacity])
    assert_compiles_to_the_same(*layers, "inductor", lengths=(10, 7))


@pytest.mark.parametrize("backend", ["lean", "grouped"])
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("balance", BALANCES)
def test_meta_device_constructs_and_runs_forward_and_backward(balance, capacity, backend):
    with torch.device("meta"):
        layer = MoE(8, 8, 4, balance=BALANCES[balance], capacity=CAPACITIES[capacity], backend=backend)
        x = torch.randn(2, 5, 8, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.device.type, y.shape) == ("meta", x.shape)
    assert {p.grad.device.type for p in layer.parameters()} == {"meta"}
    real = layer.to_empty(device="cpu")
    assert {t.device.type for t in real.state_dict().values()} == {"cpu"}
