"""Quantised experts: the slow twin's numbers, less memory, nothing else of the model changed, and no training."""

import gc
import weakref

import pytest
import torch
from tests.small.models import EXPERTS, LAYERS, PER_EXPERT, logits, model, said, tokens

from equipoise.faults import NaNExpert, SlowExpert, inject
from equipoise.layer import Experts, MoE
from equipoise.ops.lean_experts import lean_experts
from equipoise.ops.packed import GROUPS, Full, Int4, Int8
from equipoise.ops.ragged import ragged_plan
from equipoise.parallel import Ranks, apply_expert_parallel
from equipoise.routing import TopK
from equipoise.small import expert_bytes, quantize_experts
from equipoise.small.experts import Resident, Sizes, StoredExperts, packing, reference_stored

E, D, F = 5, 128, 128
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-5}  # of the largest number


def formats(dtype):
    """All, with products in that type."""
    return [Full(dtype), Int8(dtype), *(Int4(group, dtype) for group in GROUPS)]


def stored(format, activation="swiglu", dtype=torch.float32):
    plain = Experts(E, D, F, activation)
    plain.init_weights(0.1, 0.1)
    sizes = Sizes(E, D, F, activation)
    return StoredExperts(sizes, format, Resident(sizes, format, packing(format, plain.weights_of)), dtype).eval(), plain


def plan_of(case, dtype):
    """(x, plan): experts 1 and 3 have no tokens in any of them."""
    generator = torch.Generator().manual_seed(7)
    num_tokens = {"one token": 1, "none": 0, "many": 90}.get(case, 6)
    x = torch.randn(num_tokens, D, generator=generator).to(dtype)
    ids = torch.tensor([0, 2, 4])[torch.rand(num_tokens, 3, generator=generator).argsort(1)[:, :2]]
    weights = torch.rand(num_tokens * 2, generator=generator)
    keep = torch.rand(num_tokens * 2, generator=generator) > 0.4 if case == "dropped" else None
    top_k = None if case == "scattered" else 2
    of_tokens = torch.arange(num_tokens).repeat_interleave(2)
    return x, ragged_plan(of_tokens, ids.reshape(-1), weights, E, top_k=top_k, keep_N=keep)


@DTYPES
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("case", ["few", "one token", "none", "many", "dropped", "scattered"])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=["in fp32", "in bf16"])
def test_outputs_are_those_of_the_reference_loop_on_unpacked_weights(case, activation, dtype, products):
    for format in formats(products):
        experts, _ = stored(format, activation, dtype)
        x, plan = plan_of(case, dtype)
        y, expected = experts(x, plan), reference_stored(experts, x, plan)
        assert y.shape == x.shape
        assert y.dtype == dtype
        largest = expected.float().abs().max() if len(x) else 1.0
        assert ((y.float() - expected.float()).abs() <= max(TOLERANCE[dtype], TOLERANCE[products]) * largest).all(), (
            format
        )


@DTYPES
@pytest.mark.parametrize("case", ["few", "one token", "many", "dropped", "scattered"])
def test_in_full_they_have_the_bits_of_the_layers_own_experts(case, dtype):
    """Of few rows those of native code, where it can be had; else those of the lean backend."""
    experts, plain = stored(Full(dtype), dtype=dtype)
    plain = plain.to(dtype)
    x, plan = plan_of(case, dtype)
    lean = experts.not_native or case == "many"
    with torch.no_grad():
        expected = lean_experts(x, plan, plain.up, plain.down_proj, "swiglu") if lean else plain(x, plan)
        assert torch.equal(experts(x, plan), expected)
    assert torch.equal(experts(x, plan), lean_experts(x, plan, plain.up, plain.down_proj, "swiglu").detach())


def test_padding_is_left_out():
    layer = MoE(D, F, E, router=TopK(k=2)).eval()
    quantize_experts(layer, 4, 32)
    x, padding = torch.randn(2, 4, D), torch.zeros(2, 4, dtype=torch.bool)
    padding[1, 2:] = True
    y = layer(x, padding_mask=padding)
    assert not y[1, 2:].any()
    torch.testing.assert_close(y[1, :2], layer(x[1, :2]))


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32)])
@DTYPES
def test_a_model_says_what_one_with_the_unpacked_weights_says(bits, group, dtype):
    small, twin = model(dtype=dtype), model(dtype=dtype)
    quantize_experts(small, bits, group, products=dtype)
    with torch.no_grad():
        for name, layer in twin.moe_layers.items():
            for expert in range(EXPERTS):
                up, down = small.moe_layers[name].experts.weights_of(expert)
                layer.experts.up[expert], layer.experts.down_proj[expert] = up, down
    close = logits(small).float() - logits(twin).float()
    assert close.abs().max() <= (2e-5 if dtype == torch.float32 else 0.15) * logits(twin).float().abs().max()
    if dtype == torch.float32:
        assert said(small) == said(twin)


def test_memory_is_what_the_formats_say_and_the_weights_are_gone():
    for bits, group, per_weight in ((8, 64, None), (4, 32, 0.5 + 4 / 32)):
        small = model()
        gone = [weakref.ref(p) for layer in small.moe_layers.values() for p in layer.experts.parameters()]
        told = quantize_experts(small, bits, group)
        gc.collect()
        assert all(each() is None for each in gone)
        assert told["before"] == LAYERS * EXPERTS * PER_EXPERT * 4
        if per_weight is None:  # a byte each, and a scale for each of 2 * 32 + 64 output channels
            expected = LAYERS * EXPERTS * (PER_EXPERT + 2 * 128)
        else:
            expected = LAYERS * EXPERTS * PER_EXPERT * per_weight
        assert told["after"] == expert_bytes(small) == expected
        buffers = [b for layer in small.moe_layers.values() for b in layer.experts.buffers()]
        assert sum(b.untyped_storage().nbytes() for b in buffers) == expected
        assert not any("experts.gate_up_proj" in name for name in small.state_dict())


def test_only_experts_are_touched():
    small = model()
    others = {name: p for name, p in small.named_parameters() if ".experts." not in name}
    before = {name: p.detach().clone() for name, p in others.items()}
    quantize_experts(small, 8)
    assert {name: id(p) for name, p in small.named_parameters()} == {name: id(p) for name, p in others.items()}
    assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())
    assert any(".router." in name for name in before)
    assert any(".shared." in name for name in before)


def test_training_is_refused():
    small = model()
    quantize_experts(small, 8)
    small(tokens())  # nothing asks for a gradient
    small.train()
    with pytest.raises(RuntimeError, match=r"experts in int8 are for inference, and the model is in training mode"):
        small(tokens())
    small.eval().embed_tokens.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"a gradient is asked for: .*to train, load the model without"):
        small(tokens())
    with torch.no_grad():
        small(tokens())


def test_a_model_that_can_not_be_quantised_is_left_as_it_was():
    one = model()
    with torch.no_grad():
        one.moe_layers["layers.2.mlp"].experts.down_proj[3, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.2\.mlp: int8: a weight is not finite.*nothing was changed"):
        quantize_experts(one, 8)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp: int4-64: .* got a weight of 64 by 32; take groups of 32"):
        quantize_experts(one, 4, 64)
    assert all(isinstance(layer.experts, Experts) for layer in one.moe_layers.values())
    assert all(p.requires_grad for p in one.parameters())


def test_what_is_asked_for_wrongly():
    with pytest.raises(ValueError, match="bits: expected 8 or 4, got 2"):
        quantize_experts(model(), 2)
    with pytest.raises(ValueError, match="Linear has no MoE layer"):
        quantize_experts(torch.nn.Linear(2, 2))
    twice = model()
    quantize_experts(twice, 8)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp: its experts are kept in int8 already; load the model anew"):
        quantize_experts(twice, 4, 32)


def test_probes_see_single_experts():
    log = []

    class Probe:
        def begin(self, expert, num_rows):
            log.append((expert, num_rows))

        def end(self, expert):
            log.append(expert)

    experts, _ = stored(Int8())
    x, plan = plan_of("few", torch.float32)
    y = experts(x, plan)
    experts.probes = (Probe(),)
    assert torch.equal(experts(x, plan), y)
    counts = {e: int(n) for e, n in enumerate(plan.counts_e) if n}
    assert log == [entry for e, n in counts.items() for entry in ((e, n), e)]


def test_faults_work_or_are_refused_by_name():
    small = model()
    quantize_experts(small, 8)
    before = logits(small)
    slow = inject(small, SlowExpert("layers.1.mlp", expert=2, seconds=0.001))
    assert torch.equal(logits(small), before)
    slow.remove()
    with pytest.raises(ValueError, match=r"NaNExpert\.layer: expected experts with stacked weights"):
        inject(small, NaNExpert("layers.1.mlp", expert=2))


def test_they_are_not_spread_over_ranks():
    small = model()
    quantize_experts(small, 8)
    ranks = Ranks.__new__(Ranks)  # it is refused before anybody is asked
    with pytest.raises(ValueError, match=r"layers\.0\.mlp: expected experts that are in memory as they were trained"):
        apply_expert_parallel(small, ranks)


def test_they_tell_what_they_are():
    small = model()
    quantize_experts(small, 4, 32)
    assert "format=int4-32 in torch.bfloat16" in repr(small)
