"""The choices of a run's model on its text, as placement reads them."""

import numpy as np

from equipoise.train.choices import choices
from equipoise.train.specialisation import RoutedText


def test_assignments_become_a_row_per_token():
    assignments = np.array([[2, 0, 2, 0, 3], [5, 1, 4, 2, 0]])  # tokens, experts; token 1 has none
    text = RoutedText(stream=None, positions_T=np.arange(4), assignments={"moe": assignments}, num_experts={"moe": 6})
    assert choices(text, "moe").tolist() == [[1, 2], [-1, -1], [5, 4], [0, -1]]
