"""Mamba: equal to the paper's formulas written as loops; the two scans; a decoder with it decodes as it prefills."""

import re
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from equipoise.models.cache import ContiguousCache
from equipoise.models.config import DecoderConfig
from equipoise.models.decoder import Decoder
from equipoise.models.generate import generate
from equipoise.models.mamba import Mamba, MambaMixer
from equipoise.models.parameters import parameter_counts
from equipoise.ops.selective_scan import ScanInputs, chunked_scan, plain_scan
from equipoise.train.optim import decays

EXACT = {"rtol": 0, "atol": 1e-10}
D, S, B = 8, 11, 2
SMALL = Mamba(state_dim=3, conv_width=4, expand=2, dt_rank=2, chunk=4)


# ---------------------------------------------------------------------------------------------- the scan


def scan_inputs(steps: int = 37, dtype=torch.float64, dt: float = 0.2) -> ScanInputs:
    rng = torch.Generator().manual_seed(2)
    shapes = [(B, steps, 5), (B, steps, 5), (5, 3), (B, steps, 3), (B, steps, 3), (B, 5, 3)]
    x, times, a, b, c, h = (torch.randn(shape, generator=rng, dtype=dtype) for shape in shapes)
    tensors = (x, dt * times.abs(), -a.abs() - 0.1, b, c, h)
    return ScanInputs(*(each.requires_grad_() for each in tensors))


def scan_gradients(scan, inputs: ScanInputs) -> list[torch.Tensor]:
    """Outputs and all gradients of a loss that weighs every output and the last state differently."""
    y, h = scan(inputs)
    loss = (y.sin() * torch.arange(1, 1 + y.numel()).view_as(y)).sum() + 3 * h.cos().sum()
    return [y, h, *torch.autograd.grad(loss, tuple(vars(inputs).values()))]


@pytest.mark.parametrize("chunk", [1, 2, 8, 36, 37, 64])
def test_the_chunked_scan_is_the_plain_one_forward_and_backward(chunk):
    for plain, chunked in zip(
        scan_gradients(plain_scan, scan_inputs()),
        scan_gradients(lambda inputs: chunked_scan(inputs, chunk), scan_inputs()),
        strict=True,
    ):
        torch.testing.assert_close(chunked, plain, rtol=1e-10, atol=1e-10)


def test_the_plain_scan_is_the_recurrence_worked_out_by_hand():
    one = torch.ones(1, 2, 1, dtype=torch.float64)
    # exp(0.5 * -2) = e^-1. h1 = e^-1 * 4 + 0.5 * 3 * 2 = 4/e + 3; h2 = h1/e + 0.5 * 5 * 2; y = 10 h
    inputs = ScanInputs(
        torch.tensor([[[3.0], [5.0]]]).double(),
        0.5 * one,
        torch.tensor([[-2.0]]).double(),
        2 * one,
        10 * one,
        torch.tensor([[[4.0]]]).double(),
    )
    e = torch.e
    for scan in (plain_scan, chunked_scan):
        y, h = scan(inputs)
        torch.testing.assert_close(y.flatten().tolist(), [40 / e + 30, 10 * ((4 / e + 3) / e + 5)])
        assert h.item() == pytest.approx((4 / e + 3) / e + 5)


def test_a_scan_of_no_steps_keeps_the_state_and_its_gradient():
    for scan in (plain_scan, chunked_scan):
        inputs = scan_inputs(steps=0)
        y, h = scan(inputs)
        assert y.shape == (B, 0, 5)
        assert torch.equal(h, inputs.h_BIN)
        h.sum().backward()
        assert torch.equal(inputs.h_BIN.grad, torch.ones_like(h))


def test_the_gradient_of_the_chunked_scan_is_that_of_finite_differences():
    tensors = tuple(each.detach()[..., :2].requires_grad_() for each in vars(scan_inputs(5)).values())
    tensors = (*tensors[:2], tensors[2][:2], *tensors[3:5], tensors[5][:, :2])
    tensors = tuple(each.detach().clone().requires_grad_() for each in tensors)
    assert torch.autograd.gradcheck(lambda *each: chunked_scan(ScanInputs(*each), 2), tensors)


def test_long_chunks_stay_finite_in_fp32_where_decays_underflow():
    """exp(dt A) down to e^-480 per step: a quotient of cumulated decays would be 0/0 after the first."""
    inputs = scan_inputs(steps=200, dtype=torch.float32, dt=60.0)
    exact = ScanInputs(*(each.detach().double().requires_grad_() for each in vars(inputs).values()))
    for low, high in zip(
        scan_gradients(lambda each: chunked_scan(each, 128), inputs), scan_gradients(plain_scan, exact), strict=True
    ):
        assert low.isfinite().all()
        torch.testing.assert_close(low.double(), high, rtol=0.01, atol=1e-4 * float(high.detach().abs().max()))


def test_a_chunk_of_no_steps_is_refused():
    with pytest.raises(ValueError, match=r"chunk: expected at least 1 step, got 0\. Take 16 to 64"):
        chunked_scan(scan_inputs(), 0)


# ---------------------------------------------------------------------------------------------- the layer


def naive(layer: MambaMixer, x_SD: torch.Tensor) -> torch.Tensor:
    """The paper's algorithm for one sequence, token by token and channel by channel, from the state dict."""
    w = dict(layer.named_parameters())
    inner, N = w["A_log"].shape
    rank, width = w["dt_proj.weight"].shape[1], w["conv1d.weight"].shape[2]
    both = [w["in_proj.weight"] @ x for x in x_SD]
    outputs, state = [], [torch.zeros(N, dtype=x_SD.dtype) for _ in range(inner)]
    for t in range(len(x_SD)):
        u = []
        for i in range(inner):
            taps = [
                w["conv1d.weight"][i, 0, j] * both[t - width + 1 + j][i] for j in range(width) if t - width + 1 + j >= 0
            ]
            u.append(F.silu(w["conv1d.bias"][i] + sum(taps)))
        projected = w["x_proj.weight"] @ torch.stack(u)
        dt = F.softplus(w["dt_proj.weight"] @ projected[:rank] + w["dt_proj.bias"])
        b, c = projected[rank : rank + N], projected[rank + N :]
        y = []
        for i in range(inner):
            state[i] = torch.exp(dt[i] * -torch.exp(w["A_log"][i])) * state[i] + dt[i] * b * u[i]
            y.append((c @ state[i] + w["D"][i] * u[i]) * F.silu(both[t][inner + i]))
        outputs.append(w["out_proj.weight"] @ torch.stack(y))
    return torch.stack(outputs)


def make_layer(scan="chunked", **changes) -> MambaMixer:
    layer = MambaMixer(D, replace(SMALL, scan=scan, **changes), 0).double()
    for parameter in (layer.in_proj.weight, layer.x_proj.weight, layer.out_proj.weight):
        torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.normal_(layer.D)
    return layer


@pytest.mark.parametrize("scan", ["chunked", "plain"])
@pytest.mark.parametrize("width", [1, 4])
def test_the_layer_is_the_papers_loop_forward_and_in_all_gradients(scan, width):
    layer = make_layer(scan, conv_width=width)
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(B, S, D, dtype=torch.float64)
    wanted = [x, *layer.parameters()]
    y, twin = layer(x), torch.stack([naive(layer, row) for row in x])
    torch.testing.assert_close(y, twin, **EXACT)
    found = torch.autograd.grad((y * direction).sum(), wanted)
    expected = torch.autograd.grad((twin * direction).sum(), wanted)
    for actual, gradient in zip(found, expected, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(actual, gradient, **EXACT)


def test_nothing_looks_ahead():
    layer = make_layer()
    x = torch.randn(1, S, D, dtype=torch.float64, requires_grad=True)
    for t in range(S):
        (gradient,) = torch.autograd.grad(layer(x)[:, t].sum(), x)
        assert gradient[:, t + 1 :].abs().max().item() == 0 if t + 1 < S else True
        assert gradient[:, : t + 1].abs().amin() > 0, "and every token before it counts"


@pytest.mark.parametrize("pattern", ["..xx.x....x", "xxxx.......", "......xxxxx", "xxxxxxxxxxx"])
def test_padding_anywhere_changes_no_other_token_and_nothing_of_the_state(pattern):
    layer = make_layer()
    padding = torch.tensor([[mark == "x" for mark in pattern]] * B)
    real = ~padding[0]
    x = torch.randn(B, S, D, dtype=torch.float64)
    config = DecoderConfig(
        vocab_size=9, dim=D, num_layers=1, num_heads=2, hidden_dim=8, max_seq_len=64, mamba=layer.mamba
    )
    padded, plain = ContiguousCache(config, B, 40), ContiguousCache(config, B, 40)
    with torch.no_grad():
        for chunk in (x, 2 * x):  # the second forward goes on from the first's state
            y = layer(chunk, padding, padded)
            expected = layer(chunk[:, real], None, plain)
            padded.advance(S)
            plain.advance(S)
            assert y.isfinite().all()
            torch.testing.assert_close(y[:, real], expected, **EXACT)
    kept, exact = padded.state(0), plain.state(0)
    if exact is None:  # no token at all
        assert kept.h_BIN.count_nonzero() == kept.window_BIW.count_nonzero() == 0
    else:
        torch.testing.assert_close(vars(kept), vars(exact), **EXACT)


def test_the_beginning_is_the_papers():
    layer = MambaMixer(64, Mamba(), 0)
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    steps = F.softplus(layer.dt_proj.bias)
    assert 0.00099 <= steps.min() < steps.max() / 10
    assert steps.max() <= 0.101
    assert layer.dt_proj.in_features == 4
    assert torch.equal(layer.D, torch.ones(128))
    assert [name for name, each in layer.named_parameters() if each.dim() >= 2 and not decays(name, each)] == []
    assert not decays("layers.0.mamba.A_log", layer.A_log)


def test_it_runs_under_autocast_with_an_exact_scan():
    layer = MambaMixer(D, SMALL, 0)
    x = torch.randn(B, S, D)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.float().sum().backward()
    assert (y.dtype, layer.A_log.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.02 * float(layer(x).detach().abs().max()))


def test_flops_are_what_torch_counts():
    for mamba, dim in ((SMALL, D), (Mamba(expand=3, conv_width=2), 24)):
        layer, counter = MambaMixer(dim, mamba, 0), FlopCounterMode(display=False)
        with counter, torch.no_grad():
            layer(torch.randn(B, S, dim))
        assert counter.get_total_flops() == B * S * mamba.flops(dim)
        assert sum(parameter.numel() for parameter in layer.parameters()) == mamba.parameters(dim)
    # a decay is a product and an exponential, what is written two products, and a multiply-add are two more
    assert SMALL.elementwise_flops(D) == 6 * 16 * 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"state_dim": 0}, "Mamba.state_dim: expected at least 1, got 0"),
        ({"chunk": 0}, "Mamba.chunk: expected at least 1, got 0"),
        ({"dt_rank": 0}, "Mamba.dt_rank: expected at least 1, or None for dim / 16, got 0"),
        ({"dt_min": 0.2}, "expected 0 < dt_min <= dt_max, got 0.2 and 0.1. The paper has"),
        ({"scan": "fast"}, "Mamba.scan: expected 'chunked' or 'plain', got 'fast'. Both"),
    ],
)
def test_wrong_numbers_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Mamba(**fields)


# ---------------------------------------------------------------------------------------------- in the decoder

EVERYWHERE = pytest.mark.parametrize("layers", [None, (0,), (0, 2)])


@pytest.fixture
def make_model(make_config):
    def make(layers=None, **overrides) -> Decoder:
        torch.manual_seed(0)
        return Decoder(make_config(mamba=SMALL, mamba_layers=layers, **overrides)).double().eval()

    return make


def tokens(length: int = S) -> torch.Tensor:
    return torch.randint(0, 61, (B, length), generator=torch.Generator().manual_seed(1))


@EVERYWHERE
def test_decoding_is_prefilling(make_model, layers):
    model = make_model(layers)
    whole = model(tokens())
    for cut in ([1] * S, [5, 1, 1, 4], [S]):
        cache = ContiguousCache(model.config, B, S, torch.float64)
        with torch.no_grad():
            pieces = [model(piece, cache=cache) for piece in tokens().split(cut, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **EXACT)


@EVERYWHERE
def test_padding_on_either_side_changes_no_other_logits(make_model, layers):
    model = make_model(layers)
    whole, wide = model(tokens(6)), torch.zeros(B, S, dtype=torch.int64)
    for first in (0, 2, S - 6):
        wide[:, first : first + 6] = tokens(6)
        padding = torch.ones(B, S, dtype=torch.bool)
        padding[:, first : first + 6] = False
        torch.testing.assert_close(model(wide, padding_mask=padding)[:, first : first + 6], whole, **EXACT)


def test_a_padded_prompt_is_continued_as_the_bare_one(make_model):
    model = make_model((0, 1))
    prompt, more = tokens(6), tokens(S)[:, 6:]
    padded = torch.cat((torch.zeros(B, 3, dtype=torch.int64), prompt), dim=1)
    mask = torch.zeros(B, 9, dtype=torch.bool)
    mask[:, :3] = True
    cache = ContiguousCache(model.config, B, 20, torch.float64)
    with torch.no_grad():
        model(padded, cache=cache, padding_mask=mask)
        mask = torch.cat((mask, torch.zeros_like(more, dtype=torch.bool)), dim=1)
        continued = model(more, cache=cache, padding_mask=mask)
        torch.testing.assert_close(continued, model(torch.cat((prompt, more), dim=1))[:, 6:], **EXACT)


@EVERYWHERE
def test_text_is_generated_the_same_with_a_cache_and_without(make_model, layers):
    model = make_model(layers)
    texts = [generate(model, tokens(4), 12, seed=3, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*texts)
    assert texts[0].shape == (B, 16)


@EVERYWHERE
def test_parameters_are_counted_and_the_configuration_survives_json(make_model, layers):
    model = make_model(layers)
    counts = parameter_counts(model.config)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    num = len(model.config.mamba_layer_ids)
    assert (
        counts.mamba
        == num * SMALL.parameters(32)
        == sum(each.numel() for name, each in model.named_parameters() if ".mamba." in name)
    )
    assert (counts.attention == 0) == (layers is None)
    assert DecoderConfig.from_json(model.config.to_json()) == model.config


def test_a_cache_keeps_keys_and_values_for_layers_with_attention_alone(make_model):
    config = make_model((0, 2)).config
    assert ContiguousCache(config, B, 16).max_len == 16
    assert ContiguousCache(config, B, 16)._keys_LBHSD.shape[0] == 1
    assert ContiguousCache(make_model().config, B, 16)._keys_LBHSD.numel() == 0


def test_a_forward_that_fails_half_way_can_be_repeated(make_model):
    model = make_model()
    cache = ContiguousCache(model.config, B, S, torch.float64)
    with torch.no_grad():
        first = model(tokens()[:, :4], cache=cache)
        state = cache.state(0)
        broken, model.layers[1].mamba.A_log = model.layers[1].mamba.A_log, None
        with pytest.raises(AttributeError):
            model(tokens()[:, 4:], cache=cache)
        assert cache.state(0) is state
        assert cache.length == 4
        model.layers[1].mamba.A_log = broken
        rest = model(tokens()[:, 4:], cache=cache)
    torch.testing.assert_close(torch.cat((first, rest), dim=1), model(tokens()), **EXACT)


def test_a_state_is_for_inference_and_for_one_batch(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="cache: expected a forward without gradients, got one with them"):
        model(tokens(), cache=ContiguousCache(model.config, B, S, torch.float64))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"cache: expected a state of batch 3, got 2\. Make one cache"),
    ):
        model(tokens(), cache=ContiguousCache(model.config, 3, S, torch.float64))


def test_layers_are_checked(make_config):
    with pytest.raises(ValueError, match=r"mamba_layers: expected None without mamba, got \(0,\)\. Set mamba=Mamba"):
        make_config(mamba_layers=(0,))
    with pytest.raises(ValueError, match=r"mamba_layers: expected ascending layer numbers in \[0, num_layers=3\), got"):
        make_config(mamba=SMALL, mamba_layers=(1, 3))
