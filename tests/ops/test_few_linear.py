"""Linear layers side by side: torch's numbers, a row's own bits, and torch's own product wherever it is asked for."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from equipoise.ops import few_linear
from equipoise.ops.few_linear import linears, projections
from equipoise.ops.native import linear as native

DTYPES = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
INPUTS, OUTPUTS = 96, (70, 32, 3)  # neither whole fours of outputs nor whole tasks


@pytest.fixture
def _native():
    if native._library() is None:
        pytest.skip(native.load("linear.cpp", native.NEEDS).reason)


def drawn(num_rows, dtype, inputs=INPUTS, outputs=OUTPUTS):
    draw = torch.Generator().manual_seed(num_rows)
    weights = [torch.randn(out, inputs, generator=draw).to(dtype) * inputs**-0.5 for out in outputs]
    return torch.randn(num_rows, inputs, generator=draw).to(dtype), weights


def expected(x, weights):
    return torch.cat([x.double() @ weight.double().T for weight in weights], dim=1)


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 4, 5, 16, 31, 67])
def test_equals_the_products_in_fp64(dtype, num_rows):
    x, weights = drawn(num_rows, dtype)
    y, exact = native.few_rows_linear(x, weights), expected(x, weights)
    assert y.dtype == dtype
    assert y.shape == (num_rows, sum(OUTPUTS))
    assert float((y.double() - exact).norm()) <= DTYPES[dtype] * float(exact.norm())


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_are_its_own(dtype):
    """Alone, among others, with weights one by one, on any number of threads, and where another row is no number."""
    x, weights = drawn(23, dtype, outputs=(515, 200))
    together, threads = native.few_rows_linear(x, weights), torch.get_num_threads()
    for n in range(23):
        assert torch.equal(native.few_rows_linear(x[n : n + 1], weights), together[n : n + 1])
    assert torch.equal(torch.cat([native.few_rows_linear(x, [weight]) for weight in weights], dim=1), together)
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert torch.equal(native.few_rows_linear(x, weights), together)
    finally:
        torch.set_num_threads(threads)
    x[3, 5] = torch.nan
    y = native.few_rows_linear(x, weights)
    assert y[3].isnan().all()
    assert torch.equal(y[torch.arange(23) != 3], together[torch.arange(23) != 3])


@pytest.mark.usefixtures("_native")
def test_rows_that_lie_apart_are_read_right():
    x, weights = drawn(6, torch.float32)
    apart, across = torch.zeros(6, 200), torch.zeros(INPUTS, 6)
    apart[:, 10 : 10 + INPUTS], across[:] = x, x.T
    for elsewhere in (apart[:, 10 : 10 + INPUTS], across.T):
        assert torch.equal(native.few_rows_linear(elsewhere, weights), native.few_rows_linear(x, weights))


@pytest.fixture
def calls(monkeypatch, _native):
    """How many rows each native call has had."""
    seen = []

    def spy(x, weights):
        seen.append(len(x))
        return native.few_rows_linear(x, weights)

    monkeypatch.setattr(few_linear, "few_rows_linear", spy)
    return seen


def test_layers_side_by_side_with_biases(calls):
    layers = [nn.Linear(INPUTS, 40), nn.Linear(INPUTS, 24, bias=False)]
    x = torch.randn(2, 3, INPUTS)
    with torch.inference_mode():
        fast = projections(x, layers)
        assert calls == [6]
        for y, layer in zip(fast, layers, strict=True):
            torch.testing.assert_close(y, layer(x))


def test_gradients_are_torchs(calls):
    layers = [nn.Linear(INPUTS, 40), nn.Linear(INPUTS, 24)]
    x = torch.randn(3, INPUTS, requires_grad=True)
    sum(y.square().sum() for y in projections(x, layers)).backward()
    mine = [x.grad, *(layer.weight.grad for layer in layers)]
    x.grad = None
    for layer in layers:
        layer.zero_grad()
    sum(layer(x).square().sum() for layer in layers).backward()
    for grad, twin in zip(mine, [x.grad, *(layer.weight.grad for layer in layers)], strict=True):
        assert torch.equal(grad, twin)
    assert calls == []


def test_who_watches_a_layer_sees_its_forward(calls):
    layer, seen = nn.Linear(INPUTS, 8), []
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        handle = register(lambda *args: seen.append(1))
        with torch.inference_mode():
            projections(torch.randn(2, INPUTS), [layer])
        handle.remove()
    assert (len(seen), calls) == (2, [])


class Doubled(nn.Linear):
    """A layer of another kind."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_another_kind_of_layer_is_called(calls):
    layer = Doubled(INPUTS, 8)
    x = torch.randn(2, INPUTS)
    with torch.inference_mode():
        assert torch.equal(projections(x, [layer])[0], layer(x))
    assert calls == []


@pytest.mark.parametrize(
    ("change", "asked"),
    [
        ({"dtype": torch.float64}, 0),
        ({"num_rows": 257}, 0),
        ({"num_rows": 33, "dtype": torch.bfloat16}, 0),
        ({"inputs": 40}, 0),
        ({"num_rows": 256}, 1),
        ({"num_rows": 32, "dtype": torch.bfloat16}, 1),
    ],
)
def test_what_is_left_to_torch(calls, change, asked):
    x, weights = drawn(**({"num_rows": 4, "dtype": torch.float32} | change))
    with torch.no_grad():
        y = torch.cat(linears(x, weights), dim=1)
    assert len(calls) == asked
    torch.testing.assert_close(y.double(), expected(x, weights), rtol=2e-2, atol=2e-2)


def test_autocast_and_other_types_of_weights_are_torchs(calls):
    x, weights = drawn(4, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linears(x, weights)[0].dtype == torch.bfloat16
    layer = torch.compile(lambda x: linears(x, weights)[0], backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(layer(x), nn.functional.linear(x, weights[0]))
    assert calls == []


def test_reasons():
    cpu = torch.device("cpu")
    assert native.unsupported(96, torch.float64, cpu) == "no native code for torch.float64"
    assert native.unsupported(40, torch.float32, cpu) == "the native code takes inputs in multiples of 16, got 40"
    assert native.unsupported(48, torch.bfloat16, cpu) == "the native code takes inputs in multiples of 32, got 48"
    assert native.unsupported(96, torch.float32, torch.device("meta")) == "native code is for the CPU, got meta"


@pytest.mark.parametrize("shape", [(0, INPUTS), (1, 0, INPUTS)])
def test_no_rows_are_no_rows(shape):
    _, weights = drawn(1, torch.float32)
    with torch.no_grad():
        assert [tuple(y.shape) for y in linears(torch.empty(shape), weights)] == [(*shape[:-1], out) for out in OUTPUTS]


def test_what_counts_torchs_flops_sees_them(calls):
    x, weights = drawn(4, torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linears(x, weights)
    assert counter.get_total_flops() == 2 * 4 * INPUTS * sum(OUTPUTS)
    assert calls == []
