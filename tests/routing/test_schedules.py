import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.routing import Constant, CosineAnneal, HighThenLow, LinearAnneal
from equipoise.routing.schedules import value_at


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(0.3), {0: 0.3, 999: 0.3}),
        (LinearAnneal(1.0, 0.0, 10), {0: 1.0, 5: 0.5, 10: 0.0, 99: 0.0}),
        (LinearAnneal(0.0, 1.0, 4), {1: 0.25, 4: 1.0}),
        (LinearAnneal(1.0, 0.5, 0), {0: 1.0, 1: 0.5}),
        (CosineAnneal(1.0, 0.0, 10), {0: 1.0, 5: 0.5, 10: 0.0, 99: 0.0}),
        (CosineAnneal(2.0, 1.0, 3), {1: 1.75}),  # 1 + 0.5 * (1 + cos 60°) = 1.75
        (HighThenLow(0.1, 0.001, hold=100, anneal=100), {0: 0.1, 100: 0.1, 150: 0.0505, 200: 0.001, 9999: 0.001}),
    ],
    ids=repr,
)
def test_values(schedule, values):
    for step, value in values.items():
        assert schedule(step) == pytest.approx(value)
        assert value_at(schedule, step) == schedule(step)


@given(value=st.one_of(st.integers(0, 5), st.floats(0, 1)), step=st.integers(0, 10**9))
def test_a_number_is_a_schedule_that_never_moves(value, step):
    assert value_at(value, step) == value


@given(start=st.floats(0, 1), end=st.floats(0, 1), steps=st.integers(1, 100), step=st.integers(0, 200))
def test_anneals_stay_between_their_ends_and_move_one_way(start, end, steps, step):
    low, high = sorted((start, end))
    for schedule in (LinearAnneal(start, end, steps), CosineAnneal(start, end, steps)):
        now, later = schedule(step), schedule(step + 1)
        assert low - 1e-12 <= now <= high + 1e-12
        assert (later - now) * (end - start) >= -1e-12
