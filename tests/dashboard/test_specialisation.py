"""What the page of specialisation shows, without a server: options of charts, words, sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.dashboard.stores import make_roles

from equipoise.dashboard import specialisation_charts as drawn
from equipoise.dashboard.charts import served_map
from equipoise.dashboard.hub import mark
from equipoise.dashboard.page_specialisation import busiest, part_of, size_of
from equipoise.dashboard.palette import DARK, LIGHT
from equipoise.monitor.specialisation import FILE_NAME, Saturation, Served, Split

ROLES = make_roles()


def test_cells_have_their_lift_and_blank_where_too_few():
    found = ROLES.layers[0].splits["domain"]
    few = Split(found.groups, (30, 2), found.counts, found.information)
    cells = served_map(few.lift_GE, few.groups, LIGHT)["series"][0]["data"]
    assert {cell["value"][1] for cell in cells} == {0}  # 2 tokens at about half each: fewer than 5
    for cell in cells:
        expert, _, log = cell["value"]
        lift = few.lift_GE[0, expert]
        assert cell["label"]["formatter"] == f"{lift:.1f}"
        assert log == pytest.approx(np.log2(lift), abs=0.01)
    single = Split(("a", "b"), (1, 1), ((1, 0, 0, 0), (0, 1, 0, 0)), found.information)
    assert drawn.strongest(replace(ROLES.layers[0], splits={"domain": single}), "domain") == "too few tokens to tell"


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_many_experts_are_packed(palette):
    found = make_roles(num_experts=64).layers[0].splits["domain"]
    options = served_map(found.lift_GE, found.groups, palette)
    assert "data" not in options["series"][0]
    assert options["series"][0][":data"].startswith('eqp.cells("')
    assert options["yAxis"]["data"] == ["python", "verse"]


def test_the_clearest_pair_in_words():
    layer = ROLES.layers[0]
    lift_GE = layer.splits["domain"].lift_GE
    group, expert = divmod(int(lift_GE.argmax()), 4)
    assert f"{('python', 'verse')[group]} in expert {expert}, {lift_GE.max():.1f} times" in drawn.strongest(
        layer, "domain"
    )


def test_curves_of_at_most_six_layers():
    names = [f"layers.{i}.mlp" for i in range(9)]
    curves = drawn.saturation_curves(
        Saturation((1, 2), dict.fromkeys(names, (0.5, 1.0)), dict.fromkeys(names, (0.2, 0.2)))
    )
    assert [curve.name for curve in curves] == [f"layers.{i}" for i in (0, 2, 3, 5, 6, 8)]
    assert curves[0].points == ((1, 0.5), (2, 1.0))
    assert len(drawn.saturation_curves(ROLES.saturation)) == 2


def test_words_grow_with_how_often_they_come():
    words = [Served(0, "a", n, 100, 2.0) for n in (1, 25, 60, 95)]
    assert [size_of(word, 100) for word in words] == [1, 2, 4, 5]
    assert [part_of(word) for word in words] == [0, 1, 2, 3]


def test_the_busiest_experts_have_cards():
    layer = make_roles(num_experts=40).layers[0]
    kept = busiest(layer)
    assert len(kept) == 32
    assert kept == sorted(kept)
    assert min(layer.load[e] for e in kept) >= max(layer.load[e] for e in set(range(40)) - set(kept))


def test_a_file_that_comes_is_seen(tmp_path):
    absent = mark(tmp_path / FILE_NAME)
    (tmp_path / FILE_NAME).write_bytes(b"{}")
    assert mark(tmp_path / FILE_NAME) not in (absent, mark(tmp_path))
