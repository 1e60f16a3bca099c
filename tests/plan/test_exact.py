"""The oracle itself, on cases that can be worked out by hand."""

import sys

import numpy as np
import pytest

from equipoise.plan import Cluster
from equipoise.plan.exact import best_balance, least_fan_out


def test_balance_by_hand():
    assert best_balance(np.array([3.0, 3, 2, 2, 2]), Cluster(2, 6)) == pytest.approx(1)  # 3 + 3 and 2 + 2 + 2 don't fit
    assert best_balance(np.array([3.0, 1]), Cluster(2, 2)) == pytest.approx(1.5)
    assert best_balance(np.array([4.0, 0]), Cluster(2, 4)) == pytest.approx(1)  # a copy on each rank


def test_fan_out_by_hand():
    ids_TK = np.array([[0, 2], [0, 2], [1, 3], [0, 1]])
    assert least_fan_out(ids_TK, 4, Cluster(2, 4)) == 5 / 4  # {0, 2}, {1, 3}
    # loads are 3, 2, 2, 1, so {0, 2} has 5 of 8: at most 4 on a rank needs {0, 3}
    assert least_fan_out(ids_TK, 4, Cluster(2, 4), most_load=1.0) == 2


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match=r"exact placement: expected a solution, got: .*; allow more load"):
        least_fan_out(np.array([[0], [0], [1]]), 2, Cluster(2, 2), most_load=1.1)


def test_without_scipy_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pip install 'equipoise\[place-exact\]'"):
        best_balance(np.ones(2), Cluster(2, 2))
