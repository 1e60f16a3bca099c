"""Experts computed one by one for probes: the same numbers, and each probe told what is computed when."""

import pytest
import torch

from equipoise.layer import Capacity, MoE
from equipoise.layer.experts import reference_experts
from equipoise.layer.mode import NORMAL, Mode
from equipoise.layer.probed_experts import probed_experts
from equipoise.ops.lean_experts import lean_experts
from equipoise.ops.ragged import ragged_plan
from equipoise.routing import TopK

D, F, E, K, T = 16, 8, 6, 2, 40
TOLERANCE = 1e-5  # of the largest number of the tensor, as for the backends


class Probe:
    """Writes down what it is told."""

    def __init__(self, log, name="p"):
        self.log, self.name = log, name

    def begin(self, expert, num_rows):
        self.log.append((self.name, "begin", expert, num_rows))

    def end(self, expert):
        self.log.append((self.name, "end", expert))


def build(dtype=torch.float32, **options):
    layer = MoE(D, F, E, router=TopK(k=K), backend="lean", **options)
    layer.init_weights(0.5, 0.5)
    torch.nn.init.normal_(layer.router.weight, std=0.5)
    return layer.to(dtype)


def probed(layer, *names):
    """The log of new probes on the layer."""
    log = []
    layer.experts.probes = tuple(Probe(log, name) for name in names or ("p",))
    return log


def expected_log(counts_e, name="p"):
    return [
        entry
        for expert, count in enumerate(counts_e.tolist())
        if count
        for entry in ((name, "begin", expert, count), (name, "end", expert))
    ]


def without(layer, *experts):
    """No token goes to them."""
    with torch.no_grad():
        for expert in experts:
            layer.router.weight[expert, 0] = -100.0
    return layer


def inputs(dtype=torch.float32, num_tokens=T):
    x = torch.randn(num_tokens, D)
    x[:, 0] = 1.0
    return x.to(dtype)


def relative_error(actual, expected):
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-6))


# ---------------------------------------------------------------------------------------------------------- the numbers

LAYERS = {
    "plain": {},
    "gelu": {"activation": "gelu"},
    "shared": {"shared_experts": 1},
    "capacity": {"capacity": Capacity(0.6, at_inference=True)},
}


@pytest.mark.parametrize("num_tokens", [0, 1, 3, T])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_in_eval_the_output_has_the_bits_of_the_lean_backend(options, num_tokens):
    layer, x = build(**options).eval(), inputs(num_tokens=num_tokens)
    with torch.no_grad():
        expected = layer(x)
        log = probed(layer)
        assert torch.equal(layer(x), expected)
    assert bool(log) == (num_tokens > 0)
    torch.testing.assert_close(layer(x), expected)  # and with gradients, where torch multiplies for the shared expert


def test_in_bf16_it_is_close_to_the_lean_backend():
    """The lean backend multiplies whole tiles of 32 rows, whose sums may be ordered otherwise: bits may differ."""
    layer, x = build(torch.bfloat16).eval(), inputs(torch.bfloat16, 200)
    with torch.no_grad():
        lean = layer(x)
        probed(layer)
        ours = layer(x)
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, lean) <= 2e-2


def test_under_autocast_it_computes_in_the_dtype_of_autocast():
    layer, x = build().eval(), inputs()
    seen = []
    layer.experts.register_forward_hook(lambda module, args, y: seen.append(y.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        lean = layer(x)
        probed(layer)
        ours = layer(x)
    assert relative_error(ours, lean) <= 2e-2
    assert seen[0] == seen[1]


@pytest.mark.parametrize("idle", [(), (1, 4)], ids=["all-busy", "two-idle"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_output_and_gradients_equal_the_reference_loop(options, idle, routed_by, reference_moe):
    layer, x = without(build(**options), *idle), inputs().requires_grad_()
    log = probed(layer)
    y, routed = routed_by(layer, x)
    assert log == expected_log(routed.plan.counts_e)
    assert {entry[2] for entry in log} == set(range(E)) - set(idle)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    expected = reference_moe(layer, x)
    expected.y_TD.backward(cotangent.double())
    assert relative_error(y.detach(), expected.y_TD.detach()) <= TOLERANCE
    for name, leaf in {**dict(layer.named_parameters()), "x": x}.items():
        assert leaf.grad is not None, name
        assert relative_error(leaf.grad, expected.leaves[name].grad) <= TOLERANCE, name
    for expert in idle:
        assert not layer.experts.up.grad[expert].any()
        assert not layer.experts.down_proj.grad[expert].any()


def test_weights_of_idle_experts_are_not_looked_at():
    layer, x = without(build(), 2), inputs().requires_grad_()
    expected = layer(x).detach()
    with torch.no_grad():
        layer.experts.up[2], layer.experts.down_proj[2] = torch.inf, torch.nan
    probed(layer)
    y = layer(x)
    assert torch.equal(y.detach(), expected)
    y.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())


TOKENS, EXPERTS = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 2, 2, 0, 0, 2])


@pytest.mark.parametrize("top_k", [2, None], ids=["rows_TK", "scattered"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_gradcheck(activation, top_k):
    keep = torch.tensor([True, True, False, True, True, False])
    shapes = ((3, 3), (6,), (4, 4 if activation == "swiglu" else 2, 3), (4, 3, 2))
    args = tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    def run(x, weights, up, down):
        plan = ragged_plan(TOKENS, EXPERTS, weights, 4, top_k=top_k, keep_N=keep)
        return probed_experts(x, plan, up, down, activation, ())

    assert torch.autograd.gradcheck(run, args)


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:0]], ids=["all-dropped", "none"])
@pytest.mark.parametrize("top_k", [2, None], ids=["rows_TK", "scattered"])
def test_nothing_to_do_gives_zeros_and_zero_gradients(top_k, tokens):
    shapes = ((3, 8), (len(tokens),), (4, 8, 8), (4, 8, 4))
    args = x, weights, up, down = tuple(torch.randn(*shape, requires_grad=True) for shape in shapes)
    keep = torch.zeros(len(tokens), dtype=torch.bool)
    if len(tokens) == 0:
        x = x[:0]
    log = []
    results = []
    for run in (
        lambda *rest: probed_experts(*rest, [Probe(log)]),
        reference_experts,
        lean_experts,
    ):
        plan = ragged_plan(tokens, EXPERTS[: len(tokens)], weights, 4, top_k=top_k, keep_N=keep)
        y = run(x, plan, up, down, "swiglu")
        assert not y.any()
        results.append((y.detach(), *torch.autograd.grad(y.sum(), args)))
    assert log == []
    for ours, *theirs in zip(*results, strict=True):
        assert not ours.any()
        assert all(torch.equal(ours, other) for other in theirs)


# ----------------------------------------------------------------------------------------------------- what probes see


def test_each_expert_with_rows_is_begun_once_in_order_with_its_rows(routed_by):
    layer = without(build(), 0, 3).eval()
    log = probed(layer)
    _, routed = routed_by(layer, inputs())
    assert log == expected_log(routed.plan.counts_e)
    assert sum(entry[3] for entry in log if entry[1] == "begin") == T * K
    assert [entry[2] for entry in log if entry[1] == "begin"] == [1, 2, 4, 5]


def test_probes_nest(routed_by):
    layer = build().eval()
    log = probed(layer, "outer", "inner")
    _, routed = routed_by(layer, inputs())
    expected = []
    for expert, count in enumerate(routed.plan.counts_e.tolist()):
        expected += [("outer", "begin", expert, count), ("inner", "begin", expert, count)]
        expected += [("inner", "end", expert), ("outer", "end", expert)]
    assert log == expected


def test_dropped_rows_are_not_counted(routed_by):
    layer = build(capacity=Capacity(factor=None, max_tokens=3)).eval()
    log = probed(layer)
    _, routed = routed_by(layer, inputs())
    assert [entry[3] for entry in log if entry[1] == "begin"] == [3] * E  # all have more than they may take
    assert int(routed.plan.drops["hard_cap"]) == T * K - 3 * E


def test_one_token_reaches_k_experts():
    layer = build().eval()
    log = probed(layer)
    layer(inputs(num_tokens=1))
    assert [entry[3] for entry in log if entry[1] == "begin"] == [1] * K


def test_experts_without_tokens_are_not_begun():
    layer = build(shared_experts=1).eval()
    log = probed(layer)
    layer.set_mode(Mode(shut_experts=(0, 2)))
    layer(inputs())
    assert {entry[2] for entry in log} == {1, 3, 4, 5}
    log.clear()
    layer.set_mode(Mode(dense_share=1.0))
    layer(inputs())
    assert log == []
    layer.set_mode(NORMAL)
    layer(inputs()[:0])
    assert log == []


def test_between_begin_and_end_that_expert_is_computed():
    """A probe that changes an expert's weights at begin, and back at end, changes that expert's part alone."""
    layer, x = build().eval(), inputs()

    class Silencer:
        def begin(self, expert, num_rows):
            if expert == 4:
                self.before = layer.experts.down_proj[4].clone()
                layer.experts.down_proj[4].zero_()

        def end(self, expert):
            if expert == 4:
                layer.experts.down_proj[4].copy_(self.before)

    with torch.no_grad():
        healthy = layer(x)
        layer.experts.probes = (Silencer(),)
        ours = layer(x)
        layer.experts.probes = ()
        layer.experts.down_proj[4].zero_()
        expected = layer(x)
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, healthy)


@pytest.mark.parametrize("backend", ["auto", "lean", "grouped", "reference"])
def test_without_probes_nothing_has_changed(backend):
    layer, x = build().eval(), inputs()
    layer.experts.backend = backend
    before, state = layer(x), layer.state_dict().keys()
    log = probed(layer)
    layer(x)
    assert layer.state_dict().keys() == state
    layer.experts.probes = ()
    log.clear()
    assert torch.equal(layer(x), before)
    assert log == []


def test_probes_are_of_one_layer():
    one, other = build().eval(), build().eval()
    log = probed(one)
    other(inputs())
    assert log == []
