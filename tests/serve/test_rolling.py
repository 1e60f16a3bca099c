"""Numbers of the last seconds against a list of all that was ever added."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.serve.rolling import Rolling


@given(
    st.lists(st.tuples(st.floats(0, 5), st.lists(st.floats(-1e3, 1e3), max_size=4)), max_size=40), st.integers(1, 12)
)
def test_it_is_the_newest_of_the_window(adds, most):
    now, all_ = [0.0], []
    rolling = Rolling(10.0, most, lambda: now[0])
    for wait, values in adds:
        now[0] += wait
        rolling.add(*values)
        all_ += [(now[0], value) for value in values]
    recent = [value for at, value in all_[-most:] if at >= now[0] - 10.0]
    span = min(10.0, now[0])
    assert rolling.per_second() == pytest.approx(sum(recent) / span if span else 0.0)
    if recent:
        assert rolling.mean() == pytest.approx(np.mean(recent))
        assert rolling.quantiles(0.5, 0.99) == pytest.approx(np.quantile(recent, [0.5, 0.99]))
    else:
        assert np.isnan([rolling.mean(), *rolling.quantiles(0.5)]).all()


def test_what_is_given_out_does_not_change_later():
    now = [0.0]
    rolling = Rolling(10.0, 2, lambda: now[0])
    rolling.add(1.0, 2.0)
    before = rolling._recent()
    rolling.add(7.0, 8.0)
    assert sorted(before) == [1.0, 2.0]
