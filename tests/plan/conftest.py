"""Traffic to plan on: bundles of experts that fire together, with domains that prefer some of them."""

import numpy as np
import pytest

from equipoise.plan import traffic_of_ids


def bundled_ids(num_experts=32, top_k=4, bundle=4, tokens=2000, seed=0):
    """int64 (T, K). A token takes a bundle, nearly whole; popular ones oftener."""
    rng = np.random.default_rng(seed)
    num_bundles = num_experts // bundle
    order_E = rng.permutation(num_experts)
    wants_TB = rng.normal(0, 0.4, num_bundles) + rng.gumbel(size=(tokens, num_bundles))
    wants_TE = np.repeat(wants_TB, bundle, axis=1) + 0.4 * rng.gumbel(size=(tokens, num_experts))
    return order_E[np.argsort(-wants_TE, axis=1)[:, :top_k]]


@pytest.fixture
def halves():
    """(to plan on, to score on), of one layer of 32 experts, 4 per token."""
    ids_TK = bundled_ids()
    return [traffic_of_ids("moe", part, 32, num_windows=4) for part in np.split(ids_TK, 2)]
