"""Curves beside the claims: measured from runs, as a table and a picture."""

from dataclasses import replace

import pytest

from equipoise.bench.claims.arms import BALANCED, NOISE, SAME_A, UNBALANCED
from equipoise.bench.claims.claim import Found
from equipoise.bench.claims.contrast import Contrast, slope
from equipoise.bench.claims.curves import Curve, Line, Panel, curve_table, draw_curve, measure_curve
from equipoise.bench.claims.registry import CLAIMS, CURVES
from equipoise.bench.claims.report import METRICS, Page, write_report
from equipoise.bench.claims.runs import Runs
from equipoise.bench.claims.statistics import below


class Planted:
    """All numbers of a run are one, by its label; a seed adds a tenth of itself."""

    seeds = (0, 1, 2)
    trials = 2

    def __init__(self, numbers=None):
        self.numbers = numbers or {"no balancing": 3.0, "balanced (Switch loss 0.01)": 2.0}

    def result(self, arm, seed):
        return dict.fromkeys(("loss", *METRICS), self.numbers[arm.label] + seed / 10)

    def floor(self, metric):
        return 0.25


CURVE = Curve(
    name="a-sweep",
    theme="balance",
    title="A sweep",
    axis="coefficient",
    places=(0.0, 1.0),
    ticks=("0", "0.01"),
    panels=(Panel("loss", "loss [nats]"),),
    lines=(
        Line("Switch loss", (UNBALANCED, replace(BALANCED, num_seeds=1))),
        Line("half", (None, BALANCED)),
        Line("fair", computed=(0.5, 0.25)),
    ),
    note="how to read it",
)


def test_a_table_has_means_over_the_seeds_that_there_are():
    """3.0, 3.1, 3.2: mean 3.1, half of the interval 4.303 x 0.1 / sqrt(3) = 0.248. One seed has no interval."""
    rows = curve_table(measure_curve(CURVE, Planted())).splitlines()
    assert rows[0] == "| number | coefficient: | 0 | 0.01 |"
    assert rows[2:] == [
        "| loss [nats] | Switch loss | 3.1 ± 0.25 | 2 |",
        "| loss [nats] | half | - | 2.1 ± 0.25 |",
        "| loss [nats] | fair | 0.5 | 0.25 |",
    ]


def test_beside_another_run_the_seeds_do_not_count():
    """3.0 + s - (2.0 + s) is 1 for every seed s."""
    curve = replace(CURVE, panels=(Panel("loss", "beyond", beside=BALANCED),), lines=CURVE.lines[:1])
    assert curve_table(measure_curve(curve, Planted())).splitlines()[2] == "| beyond | Switch loss | 1 | 0 |"


def test_a_picture_is_drawn(tmp_path):
    draw_curve(measure_curve(CURVE, Planted()), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_points_without_a_place_are_refused():
    with pytest.raises(ValueError, match=r"curve a-sweep: expected 2 ticks .* got \[2, 1\]; put None where"):
        replace(CURVE, lines=(Line("short", (BALANCED,)),))


def test_the_page_has_the_curve_or_says_what_is_missing(tmp_path):
    page = Page(tmp_path / "claims.md", tmp_path / "img", "a command")
    found = [_found()]
    write_report(found, Runs(tmp_path, noise=NOISE), page, (CURVE,))
    text = page.path.read_text()
    assert "### A sweep" in text
    assert "Not run yet: the run no balancing, seed 0 is not there." in text
    written = write_report(found, _Whole(tmp_path), page, (CURVE, replace(CURVE, theme="another", name="not-this")))
    assert [path.name for path in written] == ["claims.md", "claims-a-sweep.png"]
    text = page.path.read_text()
    assert "How to read it.\n\n![A sweep: the numbers of the table](img/claims-a-sweep.png)\n\n| number |" in text


class _Whole(Planted, Runs):
    """A folder of runs in which everything is there."""

    def __init__(self, out):
        Runs.__init__(self, out, noise=((BALANCED, UNBALANCED),))
        object.__setattr__(self, "numbers", Planted().numbers)


def _found():
    return Found(next(claim for claim in CLAIMS if claim.theme == "balance"), "not run yet")


def test_every_run_of_a_curve_is_a_run_of_a_claim_and_every_name_its_own():
    arms = {arm for claim in CLAIMS for arm in claim.arms}
    for curve in CURVES:
        drawn = {arm.run for line in curve.lines for arm in line.arms if arm is not None}
        drawn |= {panel.beside.run for panel in curve.panels if panel.beside is not None}
        assert drawn <= arms, curve.name
    assert len({curve.name for curve in CURVES} | {claim.theme for claim in CLAIMS}) == len(CURVES) + len(
        {claim.theme for claim in CLAIMS}
    )


# ------------------------------------------------------------------------------------------------- contrasts of sweeps


def test_a_slope_is_by_hand_least_squares():
    """Over places 0, 1, 3: mean 4/3, squares 16/9 + 1/9 + 25/9 = 42/9.

    2, 2 and 5 have the slope (5 x 5/3 - 2 x 1/3 - 2 x 4/3) / (42/9) = 5 / (42/9).
    """
    roles = {"a": BALANCED, "b": SAME_A, "c": UNBALANCED}
    bench = Planted({BALANCED.label: 2.0, SAME_A.label: 2.0, UNBALANCED.label: 5.0})
    found = slope("loss", "s", "more", {"a": 0.0, "b": 1.0, "c": 3.0}).reading(bench, roles)
    assert found.values == pytest.approx([5 / (42 / 9)] * 3)
    weights = [abs(place - 4 / 3) / (42 / 9) for place in (0, 1, 3)]
    assert found.claimed.low == pytest.approx(0.25 * sum(weights) / 2)


def test_no_more_allows_for_noise_alone():
    contrast = Contrast("n", ((1.0, "a", "loss"), (-1.0, "b", "loss")), "no more")
    assert contrast.reading(Planted(), {"a": UNBALANCED, "b": BALANCED}).claimed == below(0.25)
    assert contrast.reading(Planted(), {"a": UNBALANCED, "b": BALANCED}).outcome == "contradicted"
    assert contrast.reading(Planted(), {"a": BALANCED, "b": BALANCED}).outcome == "supported"


def test_a_contrast_takes_the_seeds_that_all_its_runs_have():
    contrast = Contrast("n", ((1.0, "a", "loss"), (-1.0, "b", "loss")), "more")
    few = replace(BALANCED, num_seeds=2)
    assert len(contrast.reading(Planted(), {"a": UNBALANCED, "b": few}).values) == 2
