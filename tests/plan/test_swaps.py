"""The search: what it believes a swap is worth is what it is worth, and it stops where no swap helps."""

from itertools import combinations

import numpy as np
import pytest

from equipoise.plan.swaps import LEAST_GAIN, Descent, Packing, cost


def problem(seed, *, pairs=True, there=False):
    """12 items, 4 packs of 3 slots; of choices of 2 items."""
    rng = np.random.default_rng(seed)
    ids_TK = np.array([rng.choice(12, 2, replace=False, p=rng.dirichlet(np.ones(12))) for _ in range(200)])
    chosen_TI = np.zeros((200, 12), dtype=np.float32)
    chosen_TI[np.arange(200)[:, None], ids_TK] = 1
    pairs_II = chosen_TI.T @ chosen_TI / 200
    load_WI = (rng.dirichlet(np.ones(12), size=3) * 4).astype(np.float32)
    there_PI = rng.random((4, 12)) < 0.3 if there else None
    away_NI = rng.normal(0, 0.1, size=(5, 12))
    drift_II = (away_NI.T @ away_NI).astype(np.float32)
    packing = Packing(np.diag(pairs_II).copy(), pairs_II if pairs else None, load_WI, drift_II, there_PI, price=0.05)
    return packing, rng.permutation(12).reshape(4, 3)


@pytest.mark.parametrize("options", [{}, {"pairs": False}, {"there": True}])
@pytest.mark.parametrize("seed", range(3))
def test_it_goes_down_and_ends_where_no_swap_helps(seed, options):
    packing, items_PS = problem(seed, **options)
    descent = Descent(packing, items_PS)
    descent.run(weight=0.3)
    before, after = cost(packing, items_PS, 0.3), cost(packing, descent.items_PS, 0.3)
    assert after < before
    assert sorted(descent.items_PS.flat) == list(range(12))
    for a, b in combinations(range(12), 2):
        swapped_PS = descent.items_PS.copy()
        swapped_PS.flat[[a, b]] = swapped_PS.flat[[b, a]]
        assert cost(packing, swapped_PS, 0.3) > after - LEAST_GAIN - 1e-5


def test_a_second_descent_with_another_weight_ends_where_no_swap_helps():
    packing, items_PS = problem(7)
    descent = Descent(packing, items_PS)
    descent.run(weight=5.0)
    strict = descent.items_PS.copy()
    descent.run(weight=0.01)
    assert cost(packing, descent.items_PS, 0.01) < cost(packing, strict, 0.01)
    assert cost(packing, descent.items_PS, 5.0) >= cost(packing, strict, 5.0) - 12 * LEAST_GAIN


def test_the_start_is_left_as_it_was():
    packing, items_PS = problem(1)
    kept = items_PS.copy()
    assert Descent(packing, items_PS).run(weight=1.0) > 0
    np.testing.assert_array_equal(items_PS, kept)


def test_an_item_with_copies_is_never_twice_in_a_pack():
    packing, _ = problem(3)
    items_PS = np.array([[0, 1, 2], [0, 3, 4], [0, 5, 6], [0, 7, 8]])  # 9 to 11 are nowhere: the search only swaps
    descent = Descent(packing, items_PS)
    descent.run(weight=0.1)
    assert all(len(set(pack)) == 3 for pack in descent.items_PS.tolist())
    assert sorted(descent.items_PS.flat) == sorted(items_PS.flat)
