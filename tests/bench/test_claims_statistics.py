"""Intervals and verdicts of `equipoise bench claims`, worked out by hand."""

import math

import numpy as np
import pytest

from equipoise.bench.claims.statistics import (
    Interval,
    Range,
    above,
    below,
    bootstrap,
    exact,
    judge,
    noise_floor,
    student,
)


def test_students_interval_by_hand():
    """1, 2, 3: mean 2, standard deviation 1; t of 2 degrees is 4.303, so the half is 4.303 / sqrt(3) = 2.484."""
    found = student([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - found.mean == pytest.approx(2.4841, abs=1e-3)
    assert found.mean - found.low == pytest.approx(2.4841, abs=1e-3)
    assert found.n == 3


def test_one_value_says_nothing_of_its_spread():
    for interval in (student([5.0]), bootstrap([5.0])):
        assert (interval.low, interval.mean, interval.high) == (-math.inf, 5.0, math.inf)
        assert judge(interval, above(0.0)) == "open"


def test_what_is_computed_has_no_spread():
    assert exact(3.0) == Interval(3.0, 3.0, 3.0, 1)
    assert judge(exact(3.0), above(2.9)) == "supported"


@pytest.mark.parametrize(
    ("low", "high", "claimed", "outcome"),
    [
        (0.1, 0.3, above(0.0), "supported"),  # superiority: the whole interval beyond zero
        (-0.1, 0.3, above(0.0), "open"),
        (-0.3, 0.0, above(0.0), "contradicted"),  # at most zero
        (0.0, 0.0, above(0.0), "contradicted"),  # exactly none is none
        (-0.01, 0.015, below(0.02), "supported"),  # non-inferiority: within the margin, on either side of zero
        (-0.01, 0.025, below(0.02), "open"),
        (0.02, 0.04, below(0.02), "contradicted"),  # worse by the margin at least
        (0.3, 0.5, Range(0.2, 0.6), "supported"),
        (0.1, 0.5, Range(0.2, 0.6), "open"),
        (0.01, 0.05, above(0.1, noise=0.1), "open"),  # surely more than zero, but no more than noise makes
        (-0.01, 0.05, above(0.1, noise=0.1), "contradicted"),  # no effect, and none beyond noise
        (-0.05, -0.01, below(-0.1, noise=0.1), "open"),
        (-0.05, 0.01, below(-0.1, noise=0.1), "contradicted"),
        (0.0, 0.0, above(0.1, noise=0.1), "contradicted"),
        (0.6, 0.7, Range(0.2, 0.6), "contradicted"),
    ],
)
def test_what_an_interval_allows_to_be_said(low, high, claimed, outcome):
    assert judge(Interval((low + high) / 2, low, high, 3), claimed) == outcome


def test_a_number_that_is_none_supports_nothing():
    assert judge(Interval(math.nan, math.nan, math.nan, 3), below(1.0)) == "open"


def test_two_one_sided_tests_are_the_interval_inside_both_margins():
    """Differences -1, 0, 1 hundredths: half 2.48 hundredths, so equivalent within 0.03 and not within 0.02."""
    differences = student([-0.01, 0.0, 0.01])
    assert judge(differences, Range(-0.03, 0.03)) == "supported"
    assert judge(differences, Range(-0.02, 0.02)) == "open"


def test_the_noise_floor_is_where_the_interval_of_a_a_runs_ends():
    """-0.1, 0.0, 0.4: mean 0.1, variance (0.04 + 0.01 + 0.09) / 2 = 0.07, half 4.303 x 0.26458 / sqrt(3) = 0.6573."""
    assert noise_floor([-0.1, 0.0, 0.4]) == pytest.approx(0.7573, abs=1e-3)


def test_the_bootstrap_is_repeatable_and_covers_the_median():
    values = np.random.default_rng(1).exponential(size=40)
    one, again = bootstrap(values), bootstrap(values)
    assert one == again
    assert one.low < np.median(values) < one.high
    # Distribution-free: ranks 14 and 27 of 40 enclose the median with 96 %.
    ordered = np.sort(values)
    assert ordered[11] < one.low < ordered[17]
    assert ordered[22] < one.high < ordered[28]


def test_student_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [student(rng.normal(0.3, 2.0, size=5)) for _ in range(1000)]
    covered = sum(each.low <= 0.3 <= each.high for each in intervals)
    assert 930 <= covered <= 970  # 950 expected, a standard deviation is 7


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [1.0, math.inf], [[1.0], [2.0]]])
@pytest.mark.parametrize("interval", [student, bootstrap, noise_floor])
def test_bad_values_are_refused(values, interval):
    with pytest.raises(ValueError, match=r"values: expected one or more finite numbers, got .*leave out runs"):
        interval(values)


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match=r"range: expected low below high, got 2\.0 and 1\.0; swap them"):
        Range(2.0, 1.0)


@pytest.mark.parametrize(
    ("claimed", "text"), [(above(0.05), "above 0.05"), (below(-1.0), "below -1"), (Range(0.2, 0.6), "0.2 to 0.6")]
)
def test_ranges_as_people_read_them(claimed, text):
    assert str(claimed) == text
