"""The lab's layers in bf16 autocast and under torch.compile: near fp32, and the eager numbers without a graph break.

The layers themselves are compared with their papers' loops in the tests beside this one.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from equipoise.layer import MoE, Peer, ZeroExperts
from equipoise.layer.choice import Choice
from equipoise.models.attention_experts.build import build_attention
from equipoise.models.attention_experts.configs import MixtureOfAttention, MixtureOfHeads, SwitchHead
from equipoise.models.block import Block
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder, cross_entropy_sum
from equipoise.models.dense_like import dense_like
from equipoise.models.mamba import Mamba, MambaMixer
from equipoise.models.rope import Rotary, rotary_tables
from equipoise.ops.selective_scan import ScanInputs, chunked_scan, scan
from equipoise.routing import BiasBalance, SwitchLoss, TopK, ZLoss

# PyTorch's own deprecations inside its compiler: it makes an instance of each Function, and scripts a method.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]

B, S, D = 2, 11, 16
BALANCE = (SwitchLoss(coef=0.1), ZLoss(coef=0.1), BiasBalance())
PLAIN = DecoderConfig(vocab_size=50, dim=D, num_layers=2, num_heads=4, hidden_dim=24, max_seq_len=32, init_std=0.2)
ZERO = ZeroExperts(zero=1, copy=1, constant=2)
MOE = MoEConfig(num_experts=4, hidden_dim=8, router=TopK(k=3), balance=(SwitchLoss(coef=0.1),), zero_experts=ZERO)
MODELS = {
    "mamba": replace(PLAIN, mamba=Mamba(state_dim=4, chunk=4)),
    "mamba plain scan": replace(PLAIN, mamba=Mamba(state_dim=4, scan="plain")),
    "peer": replace(PLAIN, peer=Peer(num_experts=36, heads=2, k=3)),
    "zero experts": replace(PLAIN, moe=MOE),
    "moa": replace(PLAIN, num_kv_heads=2, attention_moe=MixtureOfAttention(num_experts=5, balance=BALANCE)),
    "switch_head": replace(
        PLAIN, num_heads=2, attention_moe=SwitchHead(num_experts=3, balance=(SwitchLoss(0.1), BiasBalance()))
    ),
    "moh": replace(PLAIN, num_kv_heads=2, attention_moe=MixtureOfHeads(shared_heads=1, balance=BALANCE)),
    "dense": dense_like(replace(PLAIN, moe=MOE), "flops"),
}
ATTENTION = ("moa", "switch_head", "moh")
EACH = pytest.mark.parametrize("name", MODELS)
PADDED = pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


@dataclass
class Part:
    """The layer of a model that is new, and how it is called."""

    module: nn.Module
    call: Callable[[nn.Module, Tensor, Tensor | None], Tensor]


def part_of(name: str) -> Part:
    """In training, with weights large enough that everything in it matters."""
    torch.manual_seed(0)
    config = MODELS[name]
    if name in ATTENTION:
        part = Part(build_attention(config, 0), lambda m, x, padding: m(x, rotary_of(config, x), padding_BS=padding))
    elif name.startswith("mamba"):
        part = Part(MambaMixer(D, config.mamba, 0), lambda m, x, padding: m(x, padding))
    elif name == "dense":
        part = Part(Block(config, 0).mlp, lambda m, x, padding: m(x))
    else:
        part = Part(Block(config, 0).mlp, lambda m, x, padding: m(x, padding_mask=padding))
    part.module.init_weights(0.3, 0.3)
    return part


def rotary_of(config: DecoderConfig, x: Tensor) -> Rotary:
    return rotary_tables(torch.arange(x.shape[1])[None], config.head_size, config.rope_theta)


def padding_of(padded: bool, length: int = S) -> Tensor | None:
    return (torch.arange(length) < torch.tensor([[3], [0]])) if padded else None


def results(part: Part, run: Callable, x: Tensor, padding: Tensor | None) -> dict[str, Tensor]:
    """Output and all gradients, by name. run: the module or what was compiled of it."""
    part.module.zero_grad()
    leaf = x.clone().requires_grad_()
    y = part.call(run, leaf, padding)
    slope = torch.linspace(-1, 1, y.numel()).view(y.shape)
    (y.float() * slope).sum().backward()
    grads = {
        key: torch.zeros_like(p) if p.grad is None else p.grad.clone() for key, p in part.module.named_parameters()
    }
    return {"y": y.detach(), "x": leaf.grad, **grads}


@PADDED
@EACH
def test_bf16_autocast_is_near_fp32_forward_and_backward(name, padded):
    part, x, padding = part_of(name), torch.randn(B, S, D), padding_of(padded)
    exact = results(part, part.module, x, padding)
    with torch.autocast("cpu", torch.bfloat16):
        near = results(part, part.module, x, padding)
    assert near.keys() == exact.keys()
    for key, right in exact.items():
        assert near[key].isfinite().all(), key
        assert near[key].dtype in ((torch.float32, torch.bfloat16) if key == "y" else (torch.float32,)), key
        # bf16 has 8 bits: one rounding is up to 0.004, and a few add up
        assert torch.dist(near[key].float(), right) <= 0.03 * right.norm() + 1e-4, key
    assert any(torch.dist(near[key].float(), right) > 0 for key, right in exact.items()), "nothing was in bf16"


@EACH
def test_a_model_in_bf16_autocast_has_about_the_loss_of_fp32_and_finite_gradients(name):
    torch.manual_seed(0)
    model, tokens = Decoder(replace(MODELS[name], init_std=0.02)).train(), torch.randint(0, 50, (B, S))
    with torch.no_grad():
        exact = cross_entropy_sum(model(tokens), tokens)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy_sum(model(tokens), tokens)[0]
    loss.backward()
    torch.testing.assert_close(loss.detach(), exact, rtol=2e-3, atol=0.0)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert sum(p.grad is not None and bool(p.grad.any()) for p in model.parameters()) > 5


def slow(name: str):
    return pytest.param(name, marks=pytest.mark.slow)


def assert_compiles_to_the_same(name: str, fullgraph: bool, cases: tuple[tuple[int, bool], ...]) -> None:
    """cases: lengths, and whether some of it is padding."""
    eager = part_of(name)
    twin = Part(copy.deepcopy(eager.module), eager.call)
    compiled = torch.compile(twin.module, fullgraph=fullgraph, backend="aot_eager")
    for length, padded in cases:
        x, padding = torch.randn(B, length, D), padding_of(padded, length)
        mine, right = results(twin, compiled, x, padding), results(eager, eager.module, x, padding)
        assert mine.keys() == right.keys()
        for key, expected in right.items():
            torch.testing.assert_close(mine[key], expected, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    for one, other in zip(twin.module.modules(), eager.module.modules(), strict=True):
        if isinstance(one, Choice | MoE) and one.balancer is not None:
            assert torch.equal(one.balancer.pending, other.balancer.pending)
            assert other.balancer.pending.any()


@pytest.mark.parametrize("name", ["mamba", "peer", "zero experts", "moa", *map(slow, ("switch_head", "moh", "dense"))])
def test_compiled_without_a_break_equals_eager(name):
    assert_compiles_to_the_same(name, True, ((S, False), (7, False)))  # the second time, sizes are unknown


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of torch.compile itself, where the graph breaks
@pytest.mark.parametrize("name", [name for name in MODELS if name != "dense"])
def test_compiled_with_padding_equals_eager(name):
    # who routes takes padding out, and losses ask how many tokens are left: there the graph breaks
    assert_compiles_to_the_same(name, name in ("mamba", "mamba plain scan", "peer"), ((S, True), (9, True)))


@pytest.mark.parametrize("length", [0, 1, 7])
def test_the_scan_as_an_operator_is_the_scan(length):
    """Also where a compiler has to be told shapes only: sizes, strides, and gradients by finite differences."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    tensors = [draw(B, length, 4), draw(B, length, 4).abs(), -draw(4, 3).abs(), draw(B, length, 3), draw(B, length, 3)]
    tensors = [each.requires_grad_() for each in (*tensors, draw(B, 4, 3))]
    y, after, before = scan(*tensors, 3)
    for mine, right in zip((y, after), chunked_scan(ScanInputs(*tensors), 3), strict=True):
        assert torch.equal(mine, right)
    assert before.shape == (-(-length // 3), B, 4, 3)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(scan, (*(each.float().detach().requires_grad_() for each in tensors), 3), test_utils=tests)
    assert torch.autograd.gradcheck(lambda *each: scan(*each, 3)[:2], tensors)
