"""Native code for few tokens: the reference's numbers, the same bits however a token comes, and reasons in words."""

import pytest
import torch

from equipoise.layer.experts import Experts, backend_for, reference_experts
from equipoise.ops.few_rows import few_rows_experts
from equipoise.ops.native import few
from equipoise.ops.packed import Full, Int4, Int8
from equipoise.ops.ragged import ragged_plan

E, D, F = 6, 192, 320  # not powers of two, and no multiples of what a thread takes at a time
FORMATS = [Full(torch.float32), Full(torch.bfloat16), Int8(), Int4(32), Int4(64)]
BY_FORMAT = pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.name}-{str(format.dtype)[6:]}")


@pytest.fixture(autouse=True)
def _native():
    if few._library() is None:
        pytest.skip(few.load("few.cpp", few.NEEDS).reason)


def weights_of(format):
    """(as native code takes them, up (E, H, D) and down (E, D, F) in fp64 as they are kept)."""
    draw = torch.Generator().manual_seed(1)
    ups = [format.pack(torch.randn(2 * F, D, generator=draw) * D**-0.5) for _ in range(E)]
    downs = [format.pack(torch.randn(D, F, generator=draw) * F**-0.5) for _ in range(E)]
    up, down = (tuple(torch.stack(parts) for parts in zip(*each, strict=True)) for each in (ups, downs))
    plain = (torch.stack([format.unpack(parts) for parts in each]).double() for each in (ups, downs))
    return few.stacked_of(format, up, down), *plain


def plan_of(num_tokens, seed=0, k=2, dropped=False, top_k=True):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, E, generator=draw).topk(k).indices.reshape(-1)
    keep = torch.rand(num_tokens * k, generator=draw) > 0.4 if dropped else None
    of_tokens, weights = torch.arange(num_tokens).repeat_interleave(k), torch.rand(num_tokens * k, generator=draw)
    return ragged_plan(of_tokens, ids, weights, E, top_k=k if top_k else None, keep_N=keep)


def x_of(format, num_tokens, seed=0):
    dtype = format.dtype if isinstance(format, Full) else torch.bfloat16
    return torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(y, expected):
    return float((y.double() - expected).norm() / expected.norm())


@BY_FORMAT
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 24])
@pytest.mark.parametrize("case", ["all", "dropped", "scattered"])
def test_equals_the_reference_on_the_weights_as_they_are_kept(format, num_tokens, case):
    weights, up, down = weights_of(format)
    plan = plan_of(num_tokens, num_tokens, dropped=case == "dropped", top_k=case != "scattered")
    for x in (x_of(format, num_tokens), x_of(format, num_tokens).float()):
        if isinstance(format, Full) and x.dtype != format.dtype:
            continue
        y = few.few_experts(x, plan, weights)
        assert y.dtype == x.dtype
        expected = reference_experts(x.double(), plan, up, down, "swiglu")
        if not expected.any():
            assert not y.any()  # all of this token's experts are dropped
            continue
        assert relative_error(y, expected) < (5e-7 if format.dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_its_twin(dtype):
    format, plan = Full(dtype), plan_of(9)
    weights, _, _ = weights_of(format)
    args = (x_of(format, 9), plan, weights.up, weights.down, "swiglu")
    twin = few_rows_experts(*args)
    assert relative_error(few.few_native_experts(*args), twin.double()) < (1e-6 if dtype == torch.float32 else 1e-2)


@BY_FORMAT
def test_a_tokens_bits_are_its_own(format):
    """Alone, among others, with any number of threads, and with its experts one by one."""
    weights, _, _ = weights_of(format)
    x, plan = x_of(format, 24), plan_of(24)
    together, threads = few.few_experts(x, plan, weights), torch.get_num_threads()
    experts_NK, weights_NK = _choices(plan)
    for t in range(24):
        alone = ragged_plan(torch.zeros(2, dtype=torch.int64), experts_NK[t], weights_NK[t], E, top_k=2)
        assert torch.equal(few.few_experts(x[t : t + 1], alone, weights), together[t : t + 1])
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert torch.equal(few.few_experts(x, plan, weights), together)
    finally:
        torch.set_num_threads(threads)
    y_RD, start = torch.empty(48, D), 0
    for expert, count in enumerate(plan.counts_e.tolist()):
        own = slice(start, start + count)
        parts = (weights.up, weights.down, weights.up_scales, weights.down_scales)
        one = few.Stacked(weights.kind, *(each if each is None else each[expert] for each in parts), weights.group)
        few.rows_of_expert(x, plan.token_ids_R[own], plan.weights_R[own], one, y_RD[own])
        start += count
    assert torch.equal(few.sum_of_rows(y_RD, plan.token_ids_R, x), together)


def _choices(plan):
    """(experts (T, K), weights (T, K)) of a plan."""
    experts_R = torch.repeat_interleave(torch.arange(E), plan.counts_e)
    return experts_R[plan.rows_TK], plan.weights_R[plan.rows_TK]


@BY_FORMAT
def test_what_is_no_number_stays_with_its_token(format):
    weights, _, _ = weights_of(format)
    x, plan = x_of(format, 8), plan_of(8)
    expected = few.few_experts(x, plan, weights)
    x[3, 5] = torch.nan
    y = few.few_experts(x, plan, weights)
    assert y[3].isnan().all()
    others = torch.arange(8) != 3
    assert torch.equal(y[others], expected[others])


def test_gates_of_any_size():
    """silu at both ends, where exp overflows, as torch has it."""
    values = torch.tensor([-1e30, -200.0, -104.0, -88.0, -20.0, -1e-3, 0.0, 1e-30, 1.0, 20.0, 90.0, 200.0, 1e30])
    for value in values:
        up, down = torch.zeros(1, 64, 32), torch.eye(32)[None]
        up[0, :32, 0], up[0, 32:, 1] = 1.0, 1.0
        x = torch.zeros(1, 32)
        x[0, 0], x[0, 1] = value, 1.0
        plan = ragged_plan(
            torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.ones(1), 1, top_k=1
        )
        y = few.few_native_experts(x, plan, up, down, "swiglu")
        torch.testing.assert_close(
            y, torch.nn.functional.silu(value.double()).float().expand(1, 32), rtol=1e-6, atol=1e-37
        )


def test_none_of_many_and_many_of_none():
    format = Full(torch.float32)
    weights, _, _ = weights_of(format)
    assert few.few_experts(torch.empty(0, D), plan_of(0), weights).shape == (0, D)
    nobody = ragged_plan(
        torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1]), torch.ones(2), E, keep_N=torch.zeros(2) > 0
    )
    assert not few.few_experts(torch.full((1, D), torch.nan), nobody, weights).any()


def test_rows_and_weights_that_lie_elsewhere_are_read_right():
    """Slices of larger tensors, and fp64 combine weights."""
    format = Full(torch.float32)
    weights, _, _ = weights_of(format)
    plan, x = plan_of(4), torch.randn(4, 2 * D)
    expected = few.few_experts(x[:, :D].clone(), plan, weights)
    assert torch.equal(few.few_experts(x[:, :D], plan, weights), expected)
    with pytest.raises(
        ValueError, match=r'native experts: the native code takes contiguous weights; use backend="few"'
    ):
        few.few_native_experts(x[:, :D], plan, weights.up.mT.contiguous().mT, weights.down, "swiglu")


class TestWhoTakesIt:
    def choice(self, experts, x, num_rows=4, **kwargs):
        with torch.no_grad():
            return backend_for("auto", x, experts.up, experts.down_proj, num_rows, experts.activation, **kwargs)

    def test_few_rows_without_gradients_on_a_cpu(self):
        experts, x = Experts(4, 32, 64), torch.empty(2, 32)
        assert self.choice(experts, x) == ("native_few", "one native call, without gradients")
        assert self.choice(experts, x, 33) == ("few", "fewest operators, without gradients; too many rows")
        assert backend_for("auto", x, experts.up, experts.down_proj, 4)[0] == "lean"  # a backward pass may come

    @pytest.mark.parametrize(
        ("experts", "dtype", "reason"),
        [
            (Experts(4, 32, 64, "gelu"), torch.float32, "no native code for gelu"),
            (Experts(4, 32, 48), torch.float32, r"takes sizes in multiples of 32, got D = 32, F = 48"),
            (
                Experts(4, 32, 64).double(),
                torch.float64,
                r"no native code for torch.float64 with weights in torch.float64",
            ),
        ],
    )
    def test_why_not(self, experts, dtype, reason):
        name, why = self.choice(experts, torch.empty(2, 32, dtype=dtype))
        assert name == "few"
        assert why.endswith(reason)

    def test_formats(self):
        assert few.unsupported_format(Int4(64), 64, 128, "swiglu") == ""
        assert few.unsupported_format(Int4(32), 32, 64, "swiglu").startswith(
            "the native code takes sizes in multiples of 64"
        )
        assert (
            few.unsupported_format(Int8(torch.float32), 64, 64, "swiglu") == "no native code for int8 in torch.float32"
        )
        assert (
            few.unsupported_format(Full(torch.float16), 64, 64, "swiglu") == "no native code for full in torch.float16"
        )

    def test_no_compiler_is_a_reason(self, monkeypatch):
        monkeypatch.setattr(few, "_library", lambda: None)
        few.unsupported.cache_clear()
        try:
            assert self.choice(Experts(4, 32, 64), torch.empty(2, 32))[0] == "few"
        finally:
            few.unsupported.cache_clear()

    def test_a_graph_is_traced_without_it(self):
        experts, plan = Experts(E, 32, 64), plan_of(3)
        x = torch.randn(3, 32)
        with torch.no_grad():
            expected = experts(x, plan)
            compiled = torch.compile(lambda x: experts(x, plan), backend="eager")
            torch.testing.assert_close(compiled(x), expected)

    def test_on_meta_it_is_not_asked(self):
        with torch.device("meta"):
            experts = Experts(4, 32, 64)
        assert few.unsupported_plain(torch.empty(2, 32, device="meta"), experts.up, experts.down_proj, "swiglu") == (
            "native code is for the CPU, got meta"
        )
