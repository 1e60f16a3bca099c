"""Assignments by token, beside lists that are filled one by one."""

import numpy as np
import pytest

from equipoise.monitor.by_token import by_token


def test_by_hand():
    ids_TK = by_token(np.array([2, 0, 2, 0, 2]), np.array([7, 1, 5, 0, 6], dtype=np.int16), 4)
    assert ids_TK.dtype == np.int16
    assert ids_TK.tolist() == [[1, 0, -1], [-1, -1, -1], [7, 5, 6], [-1, -1, -1]]


@pytest.mark.parametrize("num_tokens", [0, 1, 50])
def test_as_lists_have_it(num_tokens):
    rng = np.random.default_rng(num_tokens)
    tokens_N = rng.integers(0, max(num_tokens, 1), 3 * num_tokens)
    experts_N = rng.integers(0, 9, len(tokens_N))
    rows = [[] for _ in range(num_tokens)]
    for token, expert in zip(tokens_N, experts_N, strict=True):
        rows[token].append(int(expert))
    width = max(map(len, rows), default=0)
    expected = [row + [-1] * (width - len(row)) for row in rows]
    assert by_token(tokens_N, experts_N, num_tokens).tolist() == expected
