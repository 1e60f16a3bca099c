"""The health of experts in JAX: the numbers that NumPy and torch give, in every transformation; and the seed's check.

Shards are virtual devices in a process of their own: their number is fixed when JAX starts.
"""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from equipoise.monitor import stats
from equipoise.monitor import stats_drift as drift
from equipoise.monitor import stats_selections as selections
from equipoise.monitor.adapters.jax_health import ExpertHealth, expert_health, seed_expert_health

jax = pytest.importorskip("jax")
jnp = jax.numpy

E, K = 8, 2


def probs_of(*shape, seed=0, scale=1.0):
    logits = np.random.default_rng(seed).normal(0, scale, (*shape, E)).astype(np.float32)
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def top(probs, k=K):
    return np.argsort(-probs, axis=-1, kind="stable")[..., :k]


def assert_close(one, other):
    for name, a, b in zip(ExpertHealth._fields, one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


class TestNumbers:
    def test_golden(self):
        # tokens take 0,1 / 0,1 / 0,1 / 1,2 of four experts: 3, 4, 1, 0; capacity is ceil(1.25 * 8 / 4) = 3
        indices = jnp.array([[0, 1], [1, 0], [0, 1], [1, 2]])
        health = expert_health(indices=indices, num_experts=4, min_expected=0)
        assert int(health.num_tokens) == 4
        assert health.counts_E.tolist() == [3, 4, 1, 0]
        assert health.counts_E.dtype == jnp.int32
        assert health.share_E.tolist() == [0.375, 0.5, 0.125, 0.0]
        assert float(health.max_violation) == 1.0
        assert float(health.load_entropy) == pytest.approx(0.70282, abs=1e-5)
        assert float(health.load_cv) == pytest.approx(0.790569, abs=1e-5)
        assert health.hot_E.tolist() == [False, True, False, False]
        assert health.cold_E.tolist() == [False, False, False, True]
        assert int(health.num_outside) == 0
        assert health.soft_mass_E is None
        assert not expert_health(indices=indices, num_experts=4).cold_E.any()  # 2 assignments each prove nothing

    @pytest.mark.parametrize("k", [1, 2, E])
    def test_without_indices_the_k_largest_are_counted(self, k):
        probs = probs_of(500)
        health = expert_health(jnp.asarray(probs), num_experts=E, k=k)
        assert health.counts_E.tolist() == np.bincount(top(probs, k).reshape(-1), minlength=E).tolist()
        np.testing.assert_allclose(health.soft_mass_E, probs.sum(0), rtol=1e-5)

    def test_parity_with_numpy_and_torch(self):
        probs = probs_of(4000, scale=2.0) * np.array([4, 1, 1, 1, 1, 1, 0.2, 1e-4], dtype=np.float32)
        health = expert_health(jnp.asarray(probs), num_experts=E, k=K)
        counts = np.bincount(top(probs).reshape(-1), minlength=E)
        for theirs in (counts, torch.as_tensor(counts)):
            for name, function in (
                ("share_E", stats.load_share),
                ("max_violation", stats.max_violation),
                ("load_entropy", stats.load_entropy),
                ("load_cv", stats.coefficient_of_variation),
                ("hot_E", stats.hot_experts),
                ("cold_E", stats.cold_experts),
            ):
                expected = np.asarray(function(theirs))
                np.testing.assert_allclose(getattr(health, name), expected, rtol=1e-5, atol=1e-6, err_msg=name)
        assert bool(health.hot_E[0])
        assert health.cold_E.tolist() == [False] * 7 + [True]

    def test_all_axes_but_the_last_are_tokens(self):
        probs = probs_of(4, 16)
        flat = expert_health(jnp.asarray(probs.reshape(64, E)), num_experts=E, k=K)
        assert_close(expert_health(jnp.asarray(probs), num_experts=E, k=K), flat)

    def test_padding_is_not_counted_even_if_it_is_nan(self):
        probs = probs_of(4, 16)
        mask = np.random.default_rng(1).random((4, 16)) < 0.7
        with_nan = np.where(mask[..., None], probs, np.nan)
        expected = expert_health(jnp.asarray(probs[mask]), num_experts=E, k=K)
        assert_close(expert_health(jnp.asarray(with_nan), num_experts=E, k=K, mask=jnp.asarray(mask)), expected)
        assert int(expected.num_tokens) == mask.sum() < 64

    def test_ids_that_are_no_experts_are_counted_apart(self):
        indices = jnp.array([[0, 255], [-1, 3], [8, 7], [-8, -8]])
        health = expert_health(indices=indices, num_experts=E, mask=jnp.array([True, True, True, False]))
        assert health.counts_E.tolist() == [1, 0, 0, 1, 0, 0, 0, 1]
        assert int(health.num_outside) == 3

    def test_without_tokens_nothing_looks_collapsed(self):
        health = expert_health(jnp.zeros((0, E)), num_experts=E, k=K)
        assert float(health.max_violation) == 0.0
        assert float(health.load_entropy) == pytest.approx(1.0)
        assert not health.hot_E.any()
        assert not health.cold_E.any()


class TestTransformations:
    """One function of (probabilities, indices, mask), in each of JAX's ways to run it."""

    @staticmethod
    def inputs(*shape, seed=0):
        probs = probs_of(*shape, seed=seed)
        mask = np.random.default_rng(seed).random(shape) < 0.8
        return jnp.asarray(probs), jnp.asarray(top(probs)), jnp.asarray(mask)

    @staticmethod
    def health(probs, indices, mask, **options):
        return expert_health(probs, indices, num_experts=E, mask=mask, **options)

    def test_jit(self):
        inputs = self.inputs(32, 16)
        assert_close(jax.jit(self.health)(*inputs), self.health(*inputs))

    def test_vmap_over_layers(self):
        inputs = self.inputs(3, 64)
        stacked = jax.jit(jax.vmap(self.health))(*inputs)
        assert stacked.counts_E.shape == (3, E)
        for layer in range(3):
            assert_close([x[layer] for x in stacked], self.health(*(x[layer] for x in inputs)))

    def test_scan_over_layers(self):
        inputs = self.inputs(3, 64)
        _, scanned = jax.lax.scan(lambda carry, xs: (carry, self.health(*xs)), None, inputs)
        assert_close(scanned, jax.jit(jax.vmap(self.health))(*inputs))

    def test_sums_over_an_axis(self):
        inputs = self.inputs(4, 64)
        summed = jax.jit(jax.vmap(functools.partial(self.health, axis_name="data"), axis_name="data"))(*inputs)
        whole = jax.jit(self.health)(*inputs)
        for shard in range(4):  # every shard has the numbers of the whole batch
            assert_close([x[shard] for x in summed], whole)

    def test_gradients_pass_by(self):
        probs, indices, mask = self.inputs(16)

        def loss(probs):
            return (probs**2).sum() + 0.0 * self.health(probs, indices, mask).max_violation

        np.testing.assert_allclose(jax.jit(jax.grad(loss))(probs), 2 * probs, rtol=1e-6)


class TestTheOtherStatistics:
    @pytest.mark.parametrize(
        "function",
        [
            lambda scores: drift.fragile_share(scores, K),
            lambda scores: drift.bias_health(0.2 * scores[0], scores, K),
            lambda scores: drift.population_stability_index(scores[:10].sum(0), scores[10:].sum(0)),
            lambda scores: stats.rank_straggler_factor(scores.sum(0), [0, 1, 2, 3] * 2, 4),
            lambda scores: stats.token_share(scores.sum(0), 40),
        ],
    )
    def test_drift_and_load_under_jit(self, function):
        scores = probs_of(40)
        jitted, eager = jax.jit(function)(jnp.asarray(scores)), function(scores)
        for found, expected in zip(jax.tree.leaves(jitted), jax.tree.leaves(eager), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize(
        "function",
        [
            lambda ids: selections.router_saturation(ids[:20], ids[20:]),
            lambda ids: selections.routing_agreement(ids[:20], ids[20:]),
            lambda ids: selections.co_selection(ids, E),
            lambda ids: selections.domain_specialisation(ids, ids[:, 0] // 4, E, 2),
            lambda ids: selections.vocabulary_specialisation(ids, ids[:, 0], E, min_count=2),
        ],
    )
    def test_selections(self, function):
        ids = top(probs_of(40))
        found, expected = jax.tree.leaves(function(jnp.asarray(ids))), jax.tree.leaves(function(ids))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


SHARDED = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from equipoise.monitor.adapters.jax_health import expert_health

try:
    shard_map = jax.shard_map
except AttributeError:
    from jax.experimental.shard_map import shard_map
assert jax.device_count() == 4
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "expert"))
logits = jax.random.normal(jax.random.key(0), (64, 16, 8))
probs = jax.nn.softmax(logits)
whole = expert_health(probs, num_experts=8, k=2)
by_hand = shard_map(
    lambda p: expert_health(p, num_experts=8, k=2, axis_name=("data", "expert")),
    mesh=mesh, in_specs=P(("data", "expert")), out_specs=P(),
)
placed = jax.device_put(probs, NamedSharding(mesh, P("data")))
by_compiler = jax.jit(lambda p: expert_health(p, num_experts=8, k=2))
for found in (jax.jit(by_hand)(probs), by_compiler(placed)):
    for name, a, b in zip(whole._fields, found, whole):
        np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=name)
print(int(whole.counts_E.sum()))
"""


def test_sharded_over_four_devices():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SHARDED], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(64 * 16 * 2)]


class TestSeed:
    """What a published check of a few lines gets wrong."""

    def test_it_does_what_it_says(self):
        probs = jnp.array([[0.9, 0.05, 0.03, 0.02]] * 4)  # mass 3.6, .2, .12, .08; fair 1, hot above 1.25, cold < 0.1
        found = seed_expert_health(probs, 4)
        assert (int(found["hot_count"]), int(found["cold_count"])) == (1, 1)
        assert float(found["utilization_variance"]) == pytest.approx(np.var([3.6, 0.2, 0.12, 0.08]), rel=1e-5)

    def test_it_sees_no_collapse_of_a_narrow_margin(self):
        probs = jnp.array([[0.13] + [0.87 / 7] * 7] * 1000)  # every token goes to expert 0, by .13 against .1243
        found = seed_expert_health(probs, E)
        assert (int(found["hot_count"]), int(found["cold_count"])) == (0, 0)
        health = expert_health(probs, num_experts=E, k=1)
        assert health.counts_E.tolist() == [1000] + [0] * 7
        assert health.hot_E.tolist() == [True] + [False] * 7
        assert health.cold_E.tolist() == [False] + [True] * 7
        assert float(health.max_violation) == E - 1

    def test_its_threshold_forgets_k(self):
        tokens = jnp.arange(1000)
        indices = jnp.stack([tokens % E, (tokens + 1) % E], axis=1)  # 250 each: as even as can be
        dispatch_mask = jax.nn.one_hot(indices, E).sum(1)
        assert int(seed_expert_health(dispatch_mask, E)["hot_count"]) == E
        assert not expert_health(indices=indices, num_experts=E).hot_E.any()

    def test_it_sums_a_batch_of_sequences_over_the_batch_alone(self):
        probs = jnp.asarray(probs_of(2, 64, scale=2.0))
        assert int(seed_expert_health(probs, E)["hot_count"]) > E  # more hot experts than there are
        assert int(expert_health(probs, num_experts=E, k=K).hot_E.sum()) <= E

    def test_its_variance_grows_with_the_batch(self):
        probs = probs_of(100)
        once, tenfold = (seed_expert_health(jnp.asarray(np.tile(probs, (n, 1))), E) for n in (1, 10))
        assert float(tenfold["utilization_variance"] / once["utilization_variance"]) == pytest.approx(100, rel=1e-3)

    def test_its_cold_experts_are_the_noise_of_a_small_batch(self):
        probs = probs_of(1, scale=2.0)  # one token leaves most of its eight experts cold
        assert int(seed_expert_health(jnp.asarray(probs), E)["cold_count"]) > 0
        assert not expert_health(jnp.asarray(probs), num_experts=E, k=K).cold_E.any()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"expected indices, or router_probs and k"),
        ({"router_probs": np.zeros((4, E))}, r"expected indices, or router_probs and k"),
        ({"router_probs": np.zeros((4, 7)), "k": 2}, r"router_probs: expected shape \(\.\.\., 8\) .* got \(4, 7\)"),
        ({"router_probs": np.zeros(E), "k": 2}, r"with at least one axis of tokens, got \(8,\)"),
        ({"router_probs": np.zeros((4, E)), "k": 9}, r"k: expected 1 to 8, the number of experts, got 9"),
        ({"indices": np.zeros(4, int)}, r"indices: expected shape \(\.\.\., K\), got \(4,\); add an axis for top-1"),
        ({"indices": np.zeros((4, 2), int), "k": 3}, r"indices: expected k = 3 ids per token, got shape \(4, 2\)"),
        (
            {"indices": np.zeros((4, 2), int), "router_probs": np.zeros((5, E))},
            r"indices: expected the tokens of router_probs, \(5,\), got \(4,\)",
        ),
        ({"indices": np.zeros((4, 2), int), "mask": np.ones(3)}, r"mask: .* shape \(4,\), got \(3,\)"),
        ({"indices": np.zeros((4, 2), int), "capacity_factor": 0}, r"capacity_factor: expected more than 0, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        expert_health(**inputs, num_experts=E)


def test_without_jax_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['jax'] = None\n"
        "from equipoise.monitor.adapters.jax_health import expert_health\n"
        "try:\n    expert_health(num_experts=8)\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "pip install 'equipoise[jax]'" in done.stdout
