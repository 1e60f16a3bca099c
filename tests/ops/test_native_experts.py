"""The experts in C++ against the fp64 reference loop and their twin in torch: forward, backward, edges, same bits."""

import pytest
import torch

from equipoise.layer import Capacity, MoE
from equipoise.layer.experts import Experts, backend_for, reference_experts
from equipoise.ops.lean_experts import lean_experts
from equipoise.ops.native import experts as native
from equipoise.ops.native.build import Built, load
from equipoise.ops.native.experts import native_backward, native_experts, native_forward, why_not_native
from equipoise.ops.ragged import ragged_plan
from equipoise.routing import TopK

BF16 = torch.bfloat16
MISSING = native._missing()
needs_native = pytest.mark.skipif(MISSING is not None, reason=f"no native experts: {MISSING}")
# T, D, F, E, K. Tiles are 12 x 32, blocks up to 96 rows.
SIZES = {
    "one token": (1, 32, 32, 1, 1),
    "every expert": (5, 32, 64, 4, 4),
    "less than a tile": (7, 96, 32, 5, 2),
    "odd rows": (97, 64, 96, 3, 1),
    "several blocks": (203, 128, 160, 3, 2),
    "idle experts": (9, 32, 32, 40, 2),
}


class Problem:
    """bf16 numbers for some sizes: leaves, assignments, and the gradient of the output."""

    def __init__(self, T: int, D: int, F: int, E: int, K: int, skew: float = 0.0, keep: float = 1.0):
        self.E, self.K = E, K
        self.tensors = [
            torch.randn(T, D),
            torch.rand(T * K),
            torch.randn(E, 2 * F, D) * 0.2,
            torch.randn(E, D, F) * 0.2,
        ]
        scores = torch.rand(T, E)
        scores[:, 0] += skew
        self.ids_N = scores.topk(K).indices.reshape(-1)
        self.tokens_N = torch.arange(T).repeat_interleave(K)
        self.keep_N = None if keep == 1.0 else torch.rand(T * K) < keep
        self.cotangent = torch.randn(T, D)

    def run(self, backend, dtype=BF16, top_k: bool = True) -> list[torch.Tensor]:
        """y and the gradients of x, weights, up and down."""
        weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        x, weights, up, down = (t.to(BF16) for t in self.tensors)
        leaves = [x.to(dtype), weights.to(weights_dtype), up.to(dtype), down.to(dtype)]
        for leaf in leaves:
            leaf.requires_grad_()
        k = self.K if top_k else None
        plan = ragged_plan(self.tokens_N, self.ids_N, leaves[1], self.E, top_k=k, keep_N=self.keep_N)
        y = backend(leaves[0], plan, leaves[2], leaves[3], "swiglu")
        return [y.detach(), *torch.autograd.grad(y, leaves, self.cotangent.to(BF16).to(dtype))]


def errors(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [((a.double() - e).norm() / e.norm().clamp_min(1e-12)).item() for a, e in zip(actual, expected, strict=True)]


@needs_native
@pytest.mark.parametrize("top_k", [True, False], ids=["rows_TK", "scattered"])
@pytest.mark.parametrize("keep", [1.0, 0.7, 0.0], ids=["all", "dropped", "none"])
@pytest.mark.parametrize("size", SIZES)
def test_output_and_gradients_equal_the_reference_loop(size, keep, top_k):
    problem = Problem(*SIZES[size], keep=keep)
    expected = problem.run(reference_experts, torch.float64, top_k)
    assert max(errors(problem.run(native_experts, BF16, top_k), expected)) < 6e-3  # rounding to bf16 alone is 2e-3


@needs_native
@pytest.mark.parametrize("skew", [0.0, 1.0], ids=["even", "half of the rows to one expert"])
def test_it_is_at_least_as_exact_as_its_twin(skew):
    problem = Problem(150, 96, 64, 6, 2, skew=skew)
    expected = problem.run(reference_experts, torch.float64)
    ours, twins = errors(problem.run(native_experts), expected), errors(problem.run(lean_experts), expected)
    assert all(one < 1.05 * twin for one, twin in zip(ours, twins, strict=True)), (ours, twins)


@needs_native
@pytest.mark.parametrize("skew", [0.0, 1.0], ids=["even", "half of the rows to one expert"])
def test_same_bits_on_each_run_and_with_any_number_of_threads(skew):
    """Alone or in a team, by whichever thread: each sum has one order."""
    problem, before = Problem(230, 64, 96, 5, 2, skew=skew), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(problem.run(native_experts))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@needs_native
def test_a_row_has_the_same_bits_whatever_else_is_in_the_batch():
    x, up, down = torch.randn(150, 64).to(BF16), torch.randn(3, 64, 64).to(BF16), torch.randn(3, 64, 32).to(BF16)
    ids = torch.rand(150, 3).topk(2).indices
    weights = torch.rand(150, 2)

    def run(tokens: torch.Tensor) -> torch.Tensor:
        each = torch.arange(len(tokens)).repeat_interleave(2)
        plan = ragged_plan(each, ids[tokens].reshape(-1), weights[tokens].reshape(-1), 3, top_k=2)
        return native_experts(x[tokens], plan, up, down, "swiglu")

    together = run(torch.arange(150))
    for tokens in (torch.tensor([17]), torch.arange(149, -1, -1), torch.randint(0, 150, (40,))):
        assert torch.equal(run(tokens), together[tokens])


@needs_native
@pytest.mark.parametrize("capacity", [None, Capacity(0.5)], ids=["dropless", "capacity"])
def test_eval_output_of_a_token_of_a_layer_does_not_depend_on_the_batch(capacity):
    layer = MoE(64, 32, 4, router=TopK(k=2), capacity=capacity, backend="native").to(BF16).eval()
    layer.init_weights(0.3, 0.3)
    x = torch.randn(60, 64).to(BF16)
    together = layer(x)
    assert together.any()
    for t in range(0, 60, 7):
        torch.testing.assert_close(
            layer(x[t : t + 1]), together[t : t + 1], rtol=1e-2, atol=1e-3
        )  # the router's product


@needs_native
def test_a_token_that_is_not_finite_stays_alone():
    """No row leaks into another, though rows share tiles, and pairs of them a word."""
    problem = Problem(61, 32, 32, 3, 2)
    clean = problem.run(native_experts)
    problem.tensors[0][20] = float("nan")
    broken = problem.run(native_experts)
    others = torch.arange(61) != 20
    assert broken[0][20].isnan().all()
    assert torch.equal(broken[0][others], clean[0][others])
    assert torch.equal(broken[1][others], clean[1][others])


@needs_native
def test_large_pre_activations_neither_overflow_nor_vanish():
    problem = Problem(40, 32, 32, 2, 1)
    problem.tensors[2] *= 500  # |z| up to thousands: silu is 0 or the identity
    assert max(errors(problem.run(native_experts), problem.run(reference_experts, torch.float64))) < 6e-3


@needs_native
def test_an_empty_batch():
    y, *grads = Problem(0, 32, 32, 3, 2).run(native_experts)
    assert y.shape == (0, 32)
    assert not any(grad.any() for grad in grads)


@needs_native
def test_without_gradients_it_keeps_nothing_and_gives_the_same():
    problem = Problem(50, 64, 32, 4, 2)
    x, weights, up, down = (
        problem.tensors[0].to(BF16),
        *problem.tensors[1:2],
        *(t.to(BF16) for t in problem.tensors[2:]),
    )
    plan = ragged_plan(problem.tokens_N, problem.ids_N, weights, 4, top_k=2)
    without = native_experts(x, plan, up, down, "swiglu")
    assert not without.requires_grad
    assert torch.equal(without, native_experts(x.requires_grad_(), plan, up, down, "swiglu").detach())


@needs_native
def test_opcheck_of_the_operators():
    problem = Problem(12, 32, 32, 3, 2, keep=0.8)
    x, weights, up, down = problem.tensors[0].to(BF16), problem.tensors[1], *(t.to(BF16) for t in problem.tensors[2:])
    plan = ragged_plan(problem.tokens_N, problem.ids_N, weights, 3, top_k=2, keep_N=problem.keep_N)
    indices = (plan.token_ids_R, plan.rows_TK, plan.counts_e)
    z = torch.randn(24, 64).to(BF16)
    torch.library.opcheck(native_forward, (x, plan.weights_R, up, down, *indices, "swiglu", False))
    torch.library.opcheck(native_backward, (x, x, z, plan.weights_R, up, down, *indices, "swiglu"))


@needs_native
def test_views_are_read_as_what_they_show():
    problem = Problem(30, 64, 32, 3, 2)
    x, up, down = (problem.tensors[i].to(BF16) for i in (0, 2, 3))
    plan = ragged_plan(problem.tokens_N, problem.ids_N, problem.tensors[1], 3, top_k=2)
    views = (
        x.t().contiguous().t(),
        up.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([down, down], 2)[:, :, :32],
    )
    assert not any(view.is_contiguous() for view in views)
    y = native_experts(views[0], plan, *views[1:], "swiglu")
    assert torch.equal(y, native_experts(x, plan, up, down, "swiglu"))


@needs_native
def test_memory_kept_for_backward_is_x_and_z_and_indices():
    T, D, F, E, K = 16, 64, 32, 4, 2
    problem = Problem(T, D, F, E, K)
    x, weights, up, down = (t.to(BF16).requires_grad_() for t in problem.tensors)
    plan = ragged_plan(problem.tokens_N, problem.ids_N, weights.float(), E, top_k=K)
    saved: dict[int, int] = {}  # storage -> bytes

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        native_experts(x, plan, up, down, "swiglu")
    for parameter in (up, down):
        del saved[parameter.untyped_storage().data_ptr()]
    indices = 4 * T * K + 8 * T * K + 8 * T * K + 8 * (E + 1)  # weights, tokens, rows, counts
    assert sum(saved.values()) == 2 * T * D + 4 * T * K * F + indices


class TestWhoTakesIt:
    def experts(self, dtype=BF16, dim=64, hidden_dim=32, activation="swiglu", backend="auto") -> Experts:
        return Experts(4, dim, hidden_dim, activation, backend).to(dtype)

    def chosen(self, experts: Experts, **kwargs) -> tuple[str, str]:
        x = torch.empty(2, experts.dim, dtype=experts.dtype)
        return backend_for(experts.backend, x, experts.up, experts.down_proj, activation=experts.activation, **kwargs)

    @needs_native
    def test_bf16_on_a_cpu_in_training_and_for_many_rows(self):
        assert self.chosen(self.experts()) == ("native", "C++, fastest on a CPU, keeps the least for backward")
        assert self.chosen(self.experts(), num_rows=4)[0] == "native"
        with torch.no_grad():
            assert self.chosen(self.experts(), num_rows=4)[0] == "native_few"
            assert self.chosen(self.experts(), num_rows=10**6)[0] == "native"
        assert "backend=native (C++" in repr(self.experts())

    @pytest.mark.parametrize(
        ("what", "reason"),
        [
            ({"dtype": torch.float32}, "native computes in torch.bfloat16, not in torch.float32"),
            ({"activation": "gelu"}, "native computes swiglu, not gelu"),
            ({"activation": "clamped_swiglu"}, "native computes swiglu, not clamped_swiglu"),
            ({"dim": 40}, "native takes whole 32s, dim = 40 is not"),
            ({"hidden_dim": 16}, "native takes whole 32s, hidden_dim = 16 is not"),
        ],
    )
    @pytest.mark.parametrize("backend", ["auto", "native"])
    def test_others_get_the_lean_loop_and_hear_why(self, backend, what, reason):
        experts = self.experts(**what, backend=backend)
        name, why = self.chosen(experts)
        assert name == "lean"
        assert reason in why
        x = torch.randn(6, experts.dim, dtype=experts.dtype)
        weights = torch.rand(12).requires_grad_()
        results = []
        for run in (native_experts, lean_experts, lambda x, plan, *_: experts(x, plan)):
            plan = ragged_plan(torch.arange(6).repeat_interleave(2), torch.arange(12) % 4, weights, 4, top_k=2)
            y = run(x, plan, experts.up, experts.down_proj, experts.activation)
            results.append([y, *torch.autograd.grad(y.sum(), [*experts.parameters(), weights])])
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))

    @pytest.mark.parametrize("backend", ["auto", "native"])
    def test_no_compiler_is_the_lean_loop(self, monkeypatch, backend):
        reason = "no C++ compiler on the path (g++, c++, clang++)"
        monkeypatch.setattr(native, "load", lambda source, needs: Built(None, None, reason))
        monkeypatch.setattr(native, "cpu_features", frozenset)
        experts = self.experts(backend=backend)
        name, why = self.chosen(experts)
        assert name == "lean"
        assert reason in why
        problem = Problem(20, 64, 32, 4, 2)
        assert all(map(torch.equal, problem.run(native_experts), problem.run(lean_experts)))

    def test_a_cpu_with_better_instructions_keeps_the_library(self, monkeypatch):
        monkeypatch.setattr(native, "cpu_features", lambda: frozenset({"amx_bf16"}))
        assert self.chosen(self.experts())[1].endswith("this CPU has amx_bf16, which torch's own products use")

    def test_another_device(self):
        with torch.device("meta"):
            experts = self.experts()
            x = torch.empty(2, 64, dtype=BF16)
        assert why_not_native(x, experts.up, experts.down_proj, "swiglu") == "native is for CPUs, x is on meta"

    @needs_native
    def test_autocast_in_bf16_takes_it_for_fp32_parameters(self):
        experts = self.experts(torch.float32)
        x, ids = torch.randn(9, 64, requires_grad=True), torch.rand(9, 4).topk(2).indices
        plan = ragged_plan(torch.arange(9).repeat_interleave(2), ids.reshape(-1), torch.rand(18), 4, top_k=2)
        with torch.autocast("cpu", BF16):
            y = experts(x, plan)
        y.sum().backward()
        expected = native_experts(x.detach().to(BF16), plan, experts.up.to(BF16), experts.down_proj.to(BF16), "swiglu")
        assert y.dtype == torch.float32
        assert torch.equal(y.detach(), expected.detach().float())
        assert all(p.grad.dtype == torch.float32 for p in experts.parameters())


@needs_native
def test_the_library_is_of_this_source():
    assert load(native.SOURCE, native.NEEDS).path.stem == "lean"


@needs_native
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiled_without_graph_breaks_it_gives_the_same_bits():
    layer = MoE(64, 32, 4, router=TopK(k=2)).to(BF16)
    layer.init_weights(0.3, 0.3)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)).to(BF16).requires_grad_()
        y = run(x)
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    torch._dynamo.reset()
    torch.testing.assert_close(results[1], results[0])
