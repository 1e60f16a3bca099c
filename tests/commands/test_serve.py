"""How many threads a server computes with."""

import pytest

from equipoise.commands.serve import compute_threads


@pytest.mark.parametrize(("asked", "there", "expected"), [(None, 8, 7), (None, 1, 1), (3, 2, 3)])
def test_one_core_is_left_to_answers(asked, there, expected):
    assert compute_threads(asked, there) == expected


def test_none_is_refused():
    with pytest.raises(ValueError, match=r"threads: expected at least 1, got 0; leave it out for all cores but one"):
        compute_threads(0, 2)
