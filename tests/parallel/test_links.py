"""Measuring links: the fit against lines known beforehand, the arithmetic of dispatchers by hand, and real ranks."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.parallel.links import Effort, dispatch_seconds, faster_dispatcher, fit, measure
from equipoise.plan.links import Cost, Links, Timing

ROOT = Path(__file__).parents[2]
LINKS = Links(
    ranks=4,
    backend="gloo",
    device="cpu",
    all_to_all=Cost(1e-3, 1e6),
    all_gather=Cost(1e-3, 1e6),
    reduce_scatter=Cost(1e-3, 1e6),
    all_reduce=Cost(1e-3, 1e6),
    barrier_s=1e-4,
    expert=Cost(1e-5, 1e10),
    dim=100,
    hidden_dim=200,
    timings=(Timing("barrier", 0.0, 1e-4, 5e-5, 2e-4),),
)


def timings_of(cost, amounts):
    return [Timing("x", amount, cost.seconds(amount), 0.0, 0.0) for amount in amounts]


@given(start=st.floats(1e-7, 1e-1), rate=st.floats(1e3, 1e12))
def test_a_line_is_found_again(start, rate):
    # from where latency is nearly all to where it is nearly nothing
    amounts = [start * rate * factor for factor in (1e-3, 0.1, 1, 10, 1e3)]
    found = fit(timings_of(Cost(start, rate), amounts))
    assert found.start_s == pytest.approx(start, rel=1e-3)
    assert found.rate == pytest.approx(rate, rel=1e-3)
    assert found.error < 1e-3


def test_one_disturbed_size_does_not_tilt_the_line():
    timings = timings_of(Cost(1e-4, 1e9), [1e3, 1e4, 1e5, 1e6, 1e7])
    timings[2] = replace(timings[2], seconds=50 * timings[2].seconds)
    found = fit(timings)
    assert found.start_s == pytest.approx(1e-4, rel=1e-3)
    assert found.rate == pytest.approx(1e9, rel=1e-3)


def test_neither_part_is_negative():
    falling = [Timing("x", amount, seconds, 0, 0) for amount, seconds in ((1.0, 3.0), (2.0, 2.0), (3.0, 1.0))]
    assert fit(falling).rate == math.inf
    convex = [Timing("x", amount, amount**2, 0, 0) for amount in (1.0, 2.0, 4.0)]
    found = fit(convex)
    assert found.start_s == 0
    assert found.rate > 0


def test_a_line_needs_two_amounts():
    with pytest.raises(ValueError, match=r"fit: expected timings of at least two amounts, got \[5.0\]"):
        fit([Timing("x", 5.0, 1.0, 1.0, 1.0)] * 3)


def test_seconds_of_both_dispatchers_by_hand():
    # 4 ranks, k = 2, 10 tokens of 100 fp32: a row is 400 bytes. 4 (1 - (3/4)^2) = 1.75 copies, 3/4 of them to others.
    # all-to-all: counts 1 ms + 24 B / 1e6 B/s; then twice 1 ms + 1.3125 * 10 * 400 B / 1e6 = 5.25 ms.
    # all-gather: 1 ms + 3 * 10 * 400 / 1e6 = 13 ms, twice.
    seconds = dispatch_seconds(LINKS, tokens=10, dim=100, bytes_per_element=4, top_k=2, ranks=4)
    assert seconds["all_to_all"] == pytest.approx(1.024e-3 + 2 * 6.25e-3)
    assert seconds["all_gather"] == pytest.approx(2 * 13e-3)


def test_latency_grows_with_the_ranks():
    four, seven = (dispatch_seconds(LINKS, 1, 1, 1, 2, ranks)["all_gather"] for ranks in (4, 7))
    assert four == pytest.approx(2e-3, rel=1e-2)
    assert seven == pytest.approx(4e-3, rel=1e-2)


def test_little_is_gathered_and_much_is_sent_where_it_is_needed():
    asked = {"dim": 1000, "bytes_per_element": 2, "top_k": 2, "ranks": 4}
    assert faster_dispatcher(LINKS, tokens=1, **(asked | {"dim": 10})) == "all_gather"
    assert faster_dispatcher(LINKS, tokens=10_000, **asked) == "all_to_all"


def test_who_needs_everything_gathers():
    """With so many experts per token that every rank needs each token, both send the same bytes."""
    assert faster_dispatcher(LINKS, tokens=10_000, dim=1000, bytes_per_element=2, top_k=100, ranks=4) == "all_gather"


def test_one_rank_has_nothing_to_send():
    assert set(dispatch_seconds(LINKS, 1, 1, 1, 1, 1).values()) == {0.0}


@pytest.mark.parametrize("name", ["tokens", "dim", "bytes_per_element", "top_k", "ranks"])
def test_numbers_below_one_are_refused(name):
    asked = {"tokens": 1, "dim": 1, "bytes_per_element": 1, "top_k": 1, "ranks": 2} | {name: 0}
    with pytest.raises(ValueError, match=f"expected {name} of at least 1, got 0"):
        faster_dispatcher(LINKS, **asked)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sizes": (1024,)}, "Effort.sizes: expected two or more different numbers"),
        ({"rows": (0, 1)}, "Effort.rows: expected two or more different numbers of at least 1"),
        ({"least": 0}, "Effort.least: expected at least 1, got 0"),
    ],
)
def test_an_effort_that_fits_no_line_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        Effort(**change)


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"expected a process group; call torch\.distributed\.init_process_group"):
        measure()


def test_links_survive_json():
    assert Links.from_fields(json.loads(json.dumps(LINKS.fields())), "x") == LINKS


@pytest.mark.parametrize(
    "damage",
    [
        lambda fields: fields | {"ranks": 0},
        lambda fields: fields | {"all_to_all": {"start_s": -1.0, "rate": 1.0}},
        lambda fields: fields | {"colour": "red"},
        lambda fields: {"ranks": 4},
        lambda fields: [1, 2],
    ],
)
def test_other_files_are_refused_by_name(damage):
    with pytest.raises(ValueError, match=r"links\.json: expected the links that `equipoise bench links --out` writes"):
        Links.from_fields(damage(LINKS.fields()), "links.json")


@pytest.mark.parametrize(("start", "rate"), [(-1.0, 1.0), (0.0, 0.0), (math.nan, 1.0), (math.inf, 1.0)])
def test_costs_that_cannot_be(start, rate):
    with pytest.raises(ValueError, match="Cost: expected start_s of at least 0 seconds and a rate above 0"):
        Cost(start, rate)


def run(*command):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, check=False
    )


def test_the_command_measures_ranks_of_its_own(tmp_path):
    out = tmp_path / "links.json"
    done = run("equipoise", "bench", "links", "--ranks", "2", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "2 ranks, gloo, cpu" in done.stdout
    assert "is faster" in done.stdout
    links = Links.from_fields(json.loads(out.read_text()), str(out))
    operations = {t.operation for t in links.timings}
    assert operations == {
        "all_to_all", "uneven all_to_all", "all_gather", "reduce_scatter", "all_reduce", "barrier", "expert"
    }  # fmt: skip
    # of 1024 bytes a rank keeps half in an all-to-all of two; all-reducing moves twice that
    assert min(t.amount for t in links.timings if t.operation == "all_to_all") == 512
    assert min(t.amount for t in links.timings if t.operation == "all_reduce") == 1024
    assert min(t.amount for t in links.timings if t.operation == "expert") == 6 * 512 * 1024
    assert all(0 < t.low <= t.seconds <= t.high for t in links.timings)


def test_under_torchrun_it_uses_the_ranks_that_are_there():
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "3")
    done = run(*launcher, "-m", "equipoise", "bench", "links", "--quick", "--json", "--dim", "16")
    assert done.returncode == 0, done.stderr
    links = Links.from_fields(json.loads(done.stdout), "stdout")  # one rank speaks
    assert (links.ranks, links.dim) == (3, 16)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--ranks", "expected --ranks of at least 2, got 0; one rank has no links"),
        ("--tokens", "expected --tokens of at least 1, got 0"),
        ("--top-k", "expected --top-k of at least 1, got 0"),
        ("--dim", "Effort.dim: expected at least 1, got 0"),
    ],
)
def test_the_command_refuses_before_it_starts_anything(option, says):
    done = run("equipoise", "bench", "links", option, "0")
    assert done.returncode == 2
    assert says in done.stderr
