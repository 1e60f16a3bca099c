"""The health of a layer's experts for JAX: exact dispatched counts and what follows, under jit, vmap and sharding.

The statistics are those of stats.py, traced by JAX. It keeps no window: add counts up over steps, or call it on more
tokens. `seed_expert_health` is a published check of the same purpose, kept to show where it goes wrong.
"""

from __future__ import annotations

from collections.abc import Hashable
from importlib import import_module
from typing import Any, NamedTuple

from equipoise.monitor import stats

Array = Any  # a JAX array or tracer: jax is optional, so its type cannot be named here


class ExpertHealth(NamedTuple):
    """One layer, one batch. Arrays, so that it may be returned from a jitted function.

    num_tokens: int32, real tokens. counts_E: int32 (E,), assignments, exact below 2^31.
    num_outside: int32, ids of real tokens that are no experts; they are in no other number.
    share_E: float (E,), of the assignments. max_violation, load_entropy (H/ln E), load_cv: see stats.py.
    hot_E: bool (E,), above capacity. cold_E: bool (E,), below a tenth of the fair load, given enough assignments.
    soft_mass_E: float32 (E,), sum over tokens of the router's probabilities, T in all; None without probabilities.
        What the router would like on average, not what it does: an expert may be chosen by all with a mass of T/E.
    """

    num_tokens: Array
    counts_E: Array
    num_outside: Array
    share_E: Array
    max_violation: Array
    load_entropy: Array
    load_cv: Array
    hot_E: Array
    cold_E: Array
    soft_mass_E: Array | None


def expert_health(
    router_probs: Array | None = None,
    indices: Array | None = None,
    *,
    num_experts: int,
    k: int | None = None,
    capacity_factor: float = 1.25,
    mask: Array | None = None,
    axis_name: Hashable | None = None,
    min_expected: float = stats.DEAD_MIN_EXPECTED,
) -> ExpertHealth:
    """The health of the experts of one layer. Usable inside jit, vmap, scan and shard_map.

    All axes but the last are tokens. router_probs: float (..., E). indices: int (..., K), the experts that tokens were
    dispatched to, before drops; give them if you can. Without them, k is required and the k largest probabilities stand
    in, lower expert first on ties: right unless the router selects by something else (noise, a bias, groups).
    mask: bool, of the tokens' shape; False for padding. axis_name: mesh axes to sum over, as `jax.lax.psum` takes them:
    every device then has the numbers of the whole batch. capacity_factor, min_expected: see `stats.hot_experts` and
    `stats.cold_experts`. num_experts, k, capacity_factor and min_expected are Python numbers: static under jit.
    Raises ValueError, when traced, for inputs that do not fit together; ImportError without jax.
    """
    jax = _jax()
    jnp = jax.numpy
    _check(router_probs, indices, num_experts, k, mask)
    if indices is None:
        indices = jax.lax.top_k(router_probs, k)[1]
    real = jnp.ones(indices.shape[:-1], bool) if mask is None else jnp.asarray(mask, bool)
    inside = (indices >= 0) & (indices < num_experts)
    # ids that do not count go to one bin more, which is cut off: negative ones would wrap round to the last expert
    bins = jnp.where(inside & real[..., None], indices, num_experts)
    counts_E = jnp.zeros(num_experts + 1, jnp.int32).at[bins.reshape(-1)].add(1)[:num_experts]
    num_outside = jnp.sum(~inside & real[..., None], dtype=jnp.int32)
    num_tokens = jnp.sum(real, dtype=jnp.int32)
    soft_mass_E = None
    if router_probs is not None:
        probs_TE = jnp.where(real[..., None], router_probs, 0).astype(jnp.float32).reshape(-1, num_experts)
        soft_mass_E = probs_TE.sum(0)
    if axis_name is not None:
        sums = (num_tokens, counts_E, num_outside, soft_mass_E)
        num_tokens, counts_E, num_outside, soft_mass_E = jax.lax.psum(sums, axis_name)
    return ExpertHealth(
        num_tokens=num_tokens,
        counts_E=counts_E,
        num_outside=num_outside,
        share_E=stats.load_share(counts_E),
        max_violation=stats.max_violation(counts_E),
        load_entropy=stats.load_entropy(counts_E),
        load_cv=stats.coefficient_of_variation(counts_E),
        hot_E=stats.hot_experts(counts_E, capacity_factor),
        cold_E=stats.cold_experts(counts_E, min_expected=min_expected),
        soft_mass_E=soft_mass_E,
    )


def seed_expert_health(router_probs: Array, num_experts: int, capacity_factor: float = 1.25) -> dict[str, Array]:
    """A published health check in a few lines, literally: variance, hot and cold counts of the sum of probabilities.

    router_probs: (T, E). Use `expert_health`. What is wrong with this one, each with a test:
    it sums probabilities, not tokens, so a router that sends every token to one expert by a narrow margin is healthy;
    hot compares with capacity_factor * T / E, whatever K is, so that top-2 dispatch in perfect balance is all hot;
    cold asks for a mass below a tenth of T / E, which softmax reaches only when it is saturated, and without a gate on
    the sample; the variance grows with the square of the batch; and a (B, S, E) input is summed over B alone.
    """
    jnp = _jax().numpy
    mass = jnp.sum(router_probs, axis=0)
    fair = router_probs.shape[0] / num_experts
    return {
        "utilization_variance": jnp.var(mass),
        "hot_count": jnp.sum((mass > fair * capacity_factor).astype(jnp.int32)),
        "cold_count": jnp.sum((mass < fair * 0.1).astype(jnp.int32)),
    }


# ------------------------------------------------------------------------------------------------------- helpers


def _jax() -> Any:
    try:
        return import_module("jax")
    except ImportError as error:
        raise ImportError("jax_health needs jax; install it with: pip install 'equipoise[jax]'") from error


def _check(
    router_probs: Array | None, indices: Array | None, num_experts: int, k: int | None, mask: Array | None
) -> None:
    if indices is None and (router_probs is None or k is None):
        raise ValueError("expert_health: expected indices, or router_probs and k; pass what the experts were chosen by")
    if router_probs is not None and (router_probs.ndim < 2 or router_probs.shape[-1] != num_experts):
        raise ValueError(
            f"router_probs: expected shape (..., {num_experts}) with at least one axis of tokens, "
            f"got {tuple(router_probs.shape)}"
        )
    if indices is None and k is not None and not 1 <= k <= num_experts:
        raise ValueError(f"k: expected 1 to {num_experts}, the number of experts, got {k}")
    if indices is not None:
        if indices.ndim < 2:
            raise ValueError(f"indices: expected shape (..., K), got {tuple(indices.shape)}; add an axis for top-1")
        if k is not None and indices.shape[-1] != k:
            raise ValueError(f"indices: expected k = {k} ids per token, got shape {tuple(indices.shape)}")
        if router_probs is not None and indices.shape[:-1] != router_probs.shape[:-1]:
            raise ValueError(
                f"indices: expected the tokens of router_probs, {tuple(router_probs.shape[:-1])}, "
                f"got {tuple(indices.shape[:-1])}"
            )
    tokens = (indices if indices is not None else router_probs).shape[:-1]  # type: ignore[union-attr]
    if mask is not None and tuple(mask.shape) != tuple(tokens):
        raise ValueError(f"mask: expected one entry per token, shape {tuple(tokens)}, got {tuple(mask.shape)}")
