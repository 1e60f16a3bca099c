"""Converted coefficients against each source's own formula: the gradients on the logits of all layers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from equipoise.routing.convert import coef_from, coef_to
from equipoise.routing.losses import switch_loss

SOURCES = ["megatron", "huggingface", "gshard", "megablocks", "olmo-core"]
COEF = 0.37

# ------------------------------------------------------ the sources' formulas, on logits (L, T, E) and ids (L, T, K)


def counts(ids: Tensor, num_experts: int) -> Tensor:
    return torch.bincount(ids.flatten(), minlength=num_experts).double()


def megatron(logits_LTE: Tensor, ids_LTK: Tensor, coef: float) -> Tensor:
    """Per layer: sums over tokens of probabilities times counts, times E coef / (k T^2). Layers add up."""
    _, T, E = logits_LTE.shape
    k = ids_LTK.shape[2]
    per_layer = [(z.softmax(-1).sum(0) * counts(ids, E)).sum() for z, ids in zip(logits_LTE, ids_LTK, strict=True)]
    return torch.stack(per_layer).sum() * (E * coef / (k * T * T))


def huggingface(logits_LTE: Tensor, ids_LTK: Tensor, coef: float) -> Tensor:
    """One batch of L T tokens: per slot the share of tokens, times the mean probability, summed over slots too."""
    E, k = logits_LTE.shape[2], ids_LTK.shape[2]
    probs = logits_LTE.flatten(0, 1).softmax(-1)
    one_hot_NKE = torch.nn.functional.one_hot(ids_LTK.reshape(-1, k), E).double()
    return coef * E * (one_hot_NKE.mean(0) * probs.mean(0)[None]).sum()


def gshard(logits_LTE: Tensor, ids_LTK: Tensor, coef: float) -> Tensor:
    """Per layer: the mean over experts of (share of first choices times mean probability), times E^2. Layers add up."""
    E = logits_LTE.shape[2]
    total = logits_LTE.new_zeros(())
    for z, ids in zip(logits_LTE, ids_LTK, strict=True):
        first = torch.nn.functional.one_hot(ids[:, 0], E).double().mean(0)
        total = total + (first * z.softmax(-1).mean(0)).mean() * E * E
    return coef * total


def megablocks(logits_LTE: Tensor, ids_LTK: Tensor, coef: float) -> Tensor:
    """All layers' experts side by side: one dot product of L E counts with L E mean probabilities, scaled once."""
    L, T, E = logits_LTE.shape
    side_by_side = torch.cat(list(logits_LTE.softmax(-1)), dim=1).mean(0)
    loads = torch.cat([counts(ids, E) for ids in ids_LTK])
    return torch.dot(loads, side_by_side) * (E * coef) / (L * T * ids_LTK.shape[2])


def olmo_core(logits_LTE: Tensor, ids_LTK: Tensor, coef: float) -> Tensor:
    """Each layer has the weight coef / L and the loss E/k * (counts . mean probabilities) / T."""
    L, T, E = logits_LTE.shape
    weight = coef / L
    losses = [torch.dot(counts(i, E), z.softmax(-1).mean(0)) / T for z, i in zip(logits_LTE, ids_LTK, strict=True)]
    return sum(weight * (E / ids_LTK.shape[2]) * loss for loss in losses)


FORMULAS = dict(zip(SOURCES, [megatron, huggingface, gshard, megablocks, olmo_core], strict=True))


def ours(logits_LTE: Tensor, ids_LTK: Tensor, coef: float) -> Tensor:
    """`SwitchLoss` of micro scope on each layer's decision, added up."""
    E, assignments = logits_LTE.shape[2], ids_LTK[0].numel()
    layers = zip(logits_LTE, ids_LTK, strict=True)
    return coef * torch.stack([switch_loss(z.softmax(-1), counts(ids, E) / assignments) for z, ids in layers]).sum()


def gradients(source: str, logits_LTE: Tensor, ids_LTK: Tensor) -> tuple[Tensor, Tensor]:
    """Theirs with COEF, and ours with the converted coefficient."""
    z = logits_LTE.detach().requires_grad_()
    converted = coef_from(source, COEF, k=ids_LTK.shape[2], num_moe_layers=len(z))
    (theirs,) = torch.autograd.grad(FORMULAS[source](z, ids_LTK, COEF), z)
    (own,) = torch.autograd.grad(ours(z, ids_LTK, converted), z)
    assert own.abs().max() > 1e-6, "a zero gradient would agree with anything"
    return theirs, own


def routed(L: int, T: int, E: int, k: int) -> tuple[Tensor, Tensor]:
    """Every layer routes in its own, lopsided way."""
    logits = torch.randn(L, T, E, dtype=torch.float64) + torch.randn(L, 1, E, dtype=torch.float64)
    return logits, logits.topk(k).indices


# ------------------------------------------------------------------------------------------------- where it is exact


@pytest.mark.parametrize(("L", "T", "E", "k"), [(1, 9, 5, 1), (3, 9, 5, 1), (3, 9, 5, 2), (4, 7, 6, 4)])
@pytest.mark.parametrize("source", ["megatron", "megablocks", "olmo-core"])
def test_exact_whatever_the_routing(source, L, T, E, k):
    theirs, own = gradients(source, *routed(L, T, E, k))
    torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_huggingface_is_exact_for_one_layer(k):
    theirs, own = gradients("huggingface", *routed(1, 9, 5, k))
    torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("k", [1, 2])
def test_huggingface_is_exact_for_layers_with_the_same_loads(k):
    """The same order of experts, sharper from layer to layer: equal loads, different probabilities."""
    (z,), _ = routed(1, 9, 5, k)
    logits = torch.stack([0.5 * z, z, 3 * z])
    theirs, own = gradients("huggingface", logits, logits.topk(k).indices)
    torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-15)


def test_gshard_is_exact_for_top_1():
    theirs, own = gradients("gshard", *routed(3, 9, 5, 1))
    torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-15)


def test_gshard_is_exact_when_first_choices_are_spread_like_all_choices():
    ids = torch.tensor([[[0, 1], [1, 0], [0, 1], [1, 0]]])  # half and half, both for first choices and for all
    theirs, own = gradients("gshard", torch.randn(1, 4, 3, dtype=torch.float64), ids)
    torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------------------------------------- where it is approximate


def test_huggingface_lets_opposite_imbalances_cancel():
    # layer 0 sends all to expert 0, layer 1 all to expert 1: pooled f = (1/2, 1/2), and sum_e dP_e/dz = 0. Ours pushes
    # each layer: 0.37/2 * E/T p0 p1 on the expert that has everything
    ids = torch.tensor([[[0], [0]], [[1], [1]]])
    z = torch.randn(2, 2, 2, dtype=torch.float64)
    theirs, own = gradients("huggingface", z, ids)
    torch.testing.assert_close(theirs, torch.zeros_like(theirs), rtol=0, atol=1e-16)
    torch.testing.assert_close(own[0, :, 0], 0.185 * z[0].softmax(-1).prod(-1), rtol=1e-12, atol=0)


def test_huggingface_pushes_each_layer_by_the_mean_load():
    z, ids = routed(3, 9, 5, 2)
    theirs, own = gradients("huggingface", z, ids)
    assert not torch.allclose(own, theirs, rtol=0.1)
    leaf = z.requires_grad_()
    pooled = counts(ids, 5) / ids.numel()
    scaled = coef_from("huggingface", COEF, k=2, num_moe_layers=3)
    by_mean_load = sum(scaled * switch_loss(layer.softmax(-1), pooled) for layer in leaf)
    torch.testing.assert_close(torch.autograd.grad(by_mean_load, leaf)[0], theirs, rtol=1e-12, atol=1e-15)


def test_gshard_pushes_first_choices_only():
    # expert 0 first, expert 1 second, for every token: balanced for us in so far as both have half; not so for GShard
    ids = torch.tensor([[[0, 1], [0, 1]]])
    theirs, own = gradients("gshard", torch.zeros(1, 2, 3, dtype=torch.float64), ids)
    # E/T p_j (f_j - sum_i f_i p_i) with E=3, T=2, p=1/3: GShard f=(1,0,0), ours f=(1/2,1/2,0)
    torch.testing.assert_close(theirs[0, 0], COEF / 2 * torch.tensor([2 / 3, -1 / 3, -1 / 3]).double())
    torch.testing.assert_close(own[0, 0], COEF / 2 * torch.tensor([1 / 6, 1 / 6, -1 / 3]).double())


# -------------------------------------------------------------------------------------------------------- the library


def test_huggingface_is_what_transformers_computes():
    pytest.importorskip("transformers", reason="pip install 'equipoise[hf]' compares with transformers itself")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    for L, k in [(1, 2), (3, 2), (3, 1)]:
        logits, ids = routed(L, 9, 5, k)
        z = logits.requires_grad_()
        theirs = COEF * load_balancing_loss_func(tuple(z), num_experts=5, top_k=k)
        own_words = huggingface(z, ids, COEF)
        torch.testing.assert_close(theirs, own_words, rtol=1e-6, atol=0, check_dtype=False)
        expected, got = (torch.autograd.grad(loss, z)[0] for loss in (own_words, theirs))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(
    ("source", "expected"),
    [("megatron", 0.01), ("gshard", 0.01), ("megablocks", 0.000625), ("olmo-core", 0.000625), ("huggingface", 0.005)],
)
def test_hand_worked(source, expected):
    # 16 layers, k = 8: 0.01, 0.01 / 16, and 0.01 * 8 / 16
    assert coef_from(source, 0.01, k=8, num_moe_layers=16) == pytest.approx(expected, rel=1e-12)


@given(source=st.sampled_from(SOURCES), coef=st.floats(0, 10), k=st.integers(1, 16), num_moe_layers=st.integers(1, 100))
def test_there_and_back(source, coef, k, num_moe_layers):
    there = coef_to(source, coef, k=k, num_moe_layers=num_moe_layers)
    assert coef_from(source, there, k=k, num_moe_layers=num_moe_layers) == pytest.approx(coef, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("convert", [coef_from, coef_to])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"source": "hf"},
            r"source: expected one of megatron, huggingface, .*, got 'hf'; for another code base compare",
        ),
        (
            {"coef": -0.1},
            r"coef: expected a finite number of at least 0, got -0\.1; less than 0 would reward imbalance",
        ),
        ({"coef": float("inf")}, r"coef: expected a finite number of at least 0, got inf"),
        ({"coef": float("nan")}, r"coef: expected a finite number of at least 0, got nan"),
        ({"k": 0}, r"k: expected a whole number of at least 1, got 0"),
        ({"k": 1.5}, r"k: expected a whole number of at least 1, got 1\.5"),
        ({"num_moe_layers": 0}, r"num_moe_layers: expected a whole number of at least 1, got 0"),
    ],
)
def test_bad_input(convert, arguments, message):
    given_ = {"source": "megatron", "coef": 0.01, "k": 2, "num_moe_layers": 4} | arguments
    with pytest.raises(ValueError, match=message):
        convert(given_.pop("source"), given_.pop("coef"), **given_)
