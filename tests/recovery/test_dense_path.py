"""Stand-ins for experts: merged by load, by hand; distilled exactly where that is possible; kept and restored."""

import numpy as np
import pytest
import torch

from equipoise.layer import MoE
from equipoise.recovery.dense_path import (
    build_dense_paths,
    dense_from_state,
    dense_state,
    distilled,
    diverted,
    merged,
)
from equipoise.routing import TopK

D, F, E, K, T = 8, 6, 4, 2, 512


def build(activation="swiglu", router=TopK(k=K), shared=0):  # noqa: B008 - frozen
    torch.manual_seed(0)
    layer = MoE(D, F, E, router=router, activation=activation, shared_experts=shared).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4)
    return layer


def traffic():
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_merging_equal_experts_gives_that_expert(activation):
    """Then every average is the expert itself, and the shares of the slots sum to 1."""
    layer, x = build(activation), traffic()
    with torch.no_grad():
        layer.experts.up.copy_(layer.experts.up[:1].expand_as(layer.experts.up).clone())
        layer.experts.down_proj.copy_(layer.experts.down_proj[:1].expand_as(layer.experts.down_proj).clone())
        path = merged(layer, np.array([5, 1, 3, 7]))
        torch.testing.assert_close(path(x), layer(x))  # top-2 weights sum to 1


def test_merging_by_hand():
    """Loads 4, 3, 2, 1 of 10 in two groups of like load: {0, 3} with half, {1, 2} with half."""
    layer = build()
    path = merged(layer, np.array([4, 3, 2, 1]))
    up, down = layer.experts.up.detach(), layer.experts.down_proj.detach()
    first, second = 0.8 * up[0] + 0.2 * up[3], 0.6 * up[1] + 0.4 * up[2]
    gates_first = torch.cat([first[:F], second[:F], first[F:], second[F:]])
    torch.testing.assert_close(path.gate_up_proj.weight, gates_first)
    slots = torch.cat([0.4 * down[0] + 0.1 * down[3], 0.3 * down[1] + 0.2 * down[2]], dim=1)
    torch.testing.assert_close(path.down_proj.weight, slots)
    assert not any(parameter.requires_grad for parameter in path.parameters())


def test_an_expert_without_load_does_not_count():
    layer = build()
    with torch.no_grad():
        layer.experts.up[2] = torch.nan
        layer.experts.down_proj[2] = torch.nan
    counts = np.array([1, 1, 0, 1])
    with pytest.raises(ValueError, match=r"merged: weights of expert 2 are not finite"):
        merged(layer, np.array([1, 1, 1, 1]))
    assert all(bool(torch.isfinite(weight).all()) for weight in merged(layer, counts).parameters())


def test_distilling_is_exact_where_all_tokens_take_the_same_experts():
    """A router that always picks experts 1 and 3, half each: their 2 F units are the features, and fit perfectly."""
    layer, x = build(), traffic()
    with torch.no_grad():
        layer.router.weight.zero_()
        x[:, 0] = 1.0
        layer.router.weight[1, 0] = layer.router.weight[3, 0] = 9.0
        y = layer(x)
    paths = distilled({"a": layer}, {"a": np.array([0, T, 0, T])}, lambda: layer(x), ridge=1e-9)
    torch.testing.assert_close(paths["a"](x), y, atol=1e-4, rtol=1e-3)


def test_distilling_comes_closer_than_merging_and_both_than_nothing():
    layer, x = build(), traffic()
    fresh = torch.randn(T, D, generator=torch.Generator().manual_seed(2))
    counts = {"a": np.ones(E)}
    with torch.no_grad():
        y = layer(fresh)
        close = distilled({"a": layer}, counts, lambda: layer(x))["a"](fresh)
        rough = merged(layer, counts["a"])(fresh)
    errors = [float((y - guess).square().mean()) for guess in (close, rough, torch.zeros_like(y))]
    assert errors[0] < 0.8 * errors[1]
    assert errors[0] < 0.7 * errors[2]


def test_raw_weights_are_part_of_the_target():
    """At top-1 the weight is the raw probability: what is spilled has it, so the path must not."""
    layer, x = build(router=TopK(k=1, renormalize=False)), traffic()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[1, 0] = 1.0
        x[:, 0] = 2.0  # expert 1 for all, with a probability of e^2 / (e^2 + 3)
        y = layer(x)
    path = distilled({"a": layer}, {"a": np.array([0, T, 0, 0])}, lambda: layer(x), ridge=1e-9)["a"]
    layer.set_mode(layer.mode.__class__(dense_share=1.0), path)
    torch.testing.assert_close(layer(x), y, atol=1e-4, rtol=1e-3)


def test_diverted_puts_the_mode_back_also_after_an_error():
    layer, x = build(), traffic()
    before, path = layer.mode, merged(layer, np.ones(E))

    def fail():
        with diverted({"a": layer}, {"a": path}):
            torch.testing.assert_close(layer(x), path(x))
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert layer.mode == before


@pytest.mark.parametrize(("name", "most"), [("MAX_FITTED", K * F - 1), ("MAX_FITTED_TOGETHER", (K * F) ** 2 - 1)])
def test_a_stand_in_too_large_to_fit_is_merged(monkeypatch, name, most):
    """The square of its units is what a fit keeps in memory."""
    layer, x = build(), traffic()
    counts = {"a": np.arange(1, E + 1)}
    monkeypatch.setattr(f"equipoise.recovery.dense_path.{name}", most)
    path = build_dense_paths({"a": layer}, counts, lambda: layer(x))["a"]
    assert torch.equal(path(x), merged(layer, counts["a"])(x))


def test_building_draws_no_random_numbers():
    layer, x = build(), traffic()
    before = torch.get_rng_state()
    build_dense_paths({"a": layer}, {"a": np.ones(E)})
    build_dense_paths({"a": layer}, {"a": np.ones(E)}, lambda: layer(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_kept_and_restored():
    layers = {"layers.0.mlp": build(), "layers.2.mlp": build("gelu"), "layers.3.mlp": build(shared=1)}
    paths = build_dense_paths(layers, {name: np.ones(E) for name in layers})
    assert paths.keys() == {"layers.0.mlp", "layers.2.mlp"}  # the third has shared experts to stand in
    state = dense_state(paths)
    assert "layers.0.mlp.dense.gate_up_proj.weight" in state
    again = dense_from_state(layers, {**state, "layers.0.mlp.router.weight": torch.zeros(1)})
    x = traffic()
    assert all(torch.equal(again[name](x), path(x)) for name, path in paths.items())
    bad = {"layers.0.mlp.dense.down_proj.weight": torch.zeros(D + 1, F)}
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.dense\.: expected weights of a dense path of this layer"):
        dense_from_state(layers, bad)


def test_a_run_that_does_not_reach_the_layer_and_wrong_counts():
    layer = build()
    with pytest.raises(ValueError, match=r"distilled: run\(\) did not reach a; let it call the model"):
        distilled({"a": layer}, {"a": np.ones(E)}, lambda: None)
    with pytest.raises(ValueError, match=r"counts_E: expected 4 numbers, got shape \(3,\)"):
        merged(layer, np.ones(3))
