"""What is written is what is read; everything else is refused with the reason."""

import json

import pytest

from equipoise.plan.placement_file import read_placement_file, read_placements, write_placements
from equipoise.types import Placement

LAYERS = {"blocks.1.moe": Placement(((0, 1), (1, 2))), "blocks.0.moe": Placement(((0,), (1,)))}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "placement.json"
    write_placements(path, LAYERS, num_nodes=2)
    return path


def test_placements_come_back_in_their_order(path):
    found = read_placements(path)
    assert found == LAYERS
    assert list(found) == list(LAYERS)
    assert read_placement_file(path).num_nodes == 2


def test_nothing_else_is_left_in_the_folder(path):
    write_placements(path, {"moe": Placement.even(4, 2)})
    assert [each.name for each in path.parent.iterdir()] == ["placement.json"]
    assert read_placements(path) == {"moe": Placement(((0, 1), (2, 3)))}


def test_a_write_that_fails_leaves_the_earlier_file(path):
    with pytest.raises(ValueError, match=r"layer b: expected slots for 2 ranks, got 3; plan all layers together"):
        write_placements(path, {"a": Placement.even(4, 2), "b": Placement.even(6, 3)})
    assert read_placements(path) == LAYERS


@pytest.mark.parametrize(
    ("layers", "num_nodes", "message"),
    [
        ({}, 1, r"expected at least one layer, got none"),
        (LAYERS, 3, r"expected a number of nodes that divides 2 ranks, got 3"),
        (LAYERS, 0, r"expected a number of nodes that divides 2 ranks, got 0"),
    ],
)
def test_what_makes_no_sense_is_not_written(tmp_path, layers, num_nodes, message):
    with pytest.raises(ValueError, match=message):
        write_placements(tmp_path / "placement.json", layers, num_nodes)
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json: there is no such file; `equipoise place --out"):
        read_placements(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected JSON, .* cannot be read"),
        ("{", r"expected JSON, .* cannot be read"),
        ("[]", r"expected a file with format 'equipoise placement', got a list"),
        ('{"format": "other"}', r"expected a file with format 'equipoise placement', got format 'other'"),
    ],
)
def test_damaged_and_foreign_files_are_refused(path, text, message):
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_placements(path)


def test_bytes_that_are_no_text_are_refused(path):
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"expected JSON, .* cannot be read"):
        read_placements(path)


SLOTS = [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"expected version 1, got 2; read it with the equipoise that wrote it"),
        ({"layers": None}, r"expected layers, num_ranks and num_nodes, got .* damaged"),
        ({"layers": {}}, r"expected at least one layer"),
        ({"num_nodes": True}, r"num_nodes True; the file is damaged"),
        ({"num_ranks": 0}, r"num_ranks 0 and"),
        ({"num_nodes": 4}, r"expected a number of nodes that divides 2 ranks, got 4"),
        ({"num_ranks": 4}, r"layer blocks.1.moe: expected slots for 4 ranks, got 2"),
        ({"layers": {"a": 3}}, r"layer a: expected a list of expert numbers for each rank, got None"),
        ({"layers": {"a": {"slots": [[0.5]]}}}, r"layer a: expected a list of expert numbers"),
        ({"layers": {"a": {"slots": [[0, 0], [1]], "num_experts": 2}}}, r"layer a: .*at most once on a rank.*damaged"),
        ({"layers": {"a": {"slots": SLOTS, "num_experts": 4}}}, r"expected slots for num_experts = 4, got 3"),
    ],
)
def test_damaged_contents_are_refused(path, change, message):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_placements(path)
