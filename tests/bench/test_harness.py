"""The harness: alternation, medians within a round, what counts as the same, and Ctrl-C."""

import re
from functools import partial

import pytest
import torch

from equipoise.bench.harness import Effort, Variant, ratio, relative_error, require_same, spread, time_side_by_side
from equipoise.bench.progress import Line, Pieces, Quiet
from equipoise.bench.report import shown


def test_variants_alternate_and_are_reset_around_each_run():
    log = []
    variants = [Variant(name, partial(log.append, name), partial(log.append, "reset")) for name in "AB"]
    seconds = time_side_by_side(variants, Effort(rounds=2, warmup=1))
    assert log == ["reset", "A", "reset", "reset", "B", "reset"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"A": 2, "B": 2}


def test_another_clock_times_every_run():
    timed = []

    def clock(run):
        timed.append(run())
        return len(timed)

    seconds = time_side_by_side([Variant("A", lambda: "ran")], Effort(rounds=2, warmup=1, clock=clock))
    assert timed == ["ran"] * 3
    assert seconds == {"A": (2.0, 3.0)}  # the warm-up's was 1


def test_short_runs_are_repeated_to_fill_a_round():
    calls = []
    time_side_by_side([Variant("A", partial(calls.append, 1))], Effort(rounds=1, warmup=1, min_seconds=1e-3))
    assert len(calls) > 2


def test_ratios_are_taken_round_by_round():
    # Both slow down together: the ratio is 2 in each round, though the times overlap.
    assert ratio({"a": (2.0, 20.0, 4.0), "b": (1.0, 10.0, 2.0)}, "a", "b") == spread((2.0, 2.0, 2.0))


def test_relative_error_is_the_largest_of_the_pairs():
    # |(3, 4) - (3, 3)| / |(3, 3)| = 1 / sqrt(18)
    pairs = [torch.tensor([1.0]), torch.tensor([3.0, 4.0])], [torch.tensor([1.0]), torch.tensor([3.0, 3.0])]
    assert relative_error(*pairs) == pytest.approx(18**-0.5)


def test_nan_is_not_the_same():
    with pytest.raises(ValueError, match="got nan"):
        require_same("broken", [torch.tensor([float("nan")])], [torch.ones(1)], limit=1.0)


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "-"),
        (1234.4, "1234"),
        (12.34, "12.3"),
        (0.0, "0.00"),
        (1.0, "1.00"),
        (0.00123, "1.2e-03"),
        (spread((2.0, 2.0)), "2.00 [2.00, 2.00]"),
    ],
)
def test_cells_show_three_digits(cell, text):
    assert shown(cell) == text


class Third:
    """Stops in its third call, as a finger on Ctrl-C does."""

    calls = 0

    def __call__(self):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt


def test_ctrl_c_keeps_the_whole_rounds_where_the_progress_says_so(capsys):
    line = Line()
    seconds = time_side_by_side([Variant("A", Third())], Effort(rounds=9, warmup=1, progress=line))
    assert len(seconds["A"]) == 1  # one call warmed up, one was timed, the third was stopped
    assert line.stopped
    with pytest.raises(KeyboardInterrupt):  # nothing new is begun after it
        time_side_by_side([Variant("A", int)], Effort(rounds=1, progress=line))


def test_ctrl_c_raises_where_nobody_shows_what_there_is():
    with pytest.raises(KeyboardInterrupt):
        time_side_by_side([Variant("A", Third())], Effort(rounds=9, warmup=1, progress=Quiet()))


def test_ctrl_c_before_a_whole_round_raises():
    with pytest.raises(KeyboardInterrupt):
        time_side_by_side([Variant("A", Third())], Effort(rounds=9, warmup=2, progress=Line()))


def test_the_line_says_what_is_measured_and_how_long_it_took(capsys):
    line = Line()
    line.begin("coarse: forward")
    for done in (1, 2):
        line.advance(done, 2)
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(" coarse: forward")
    assert "coarse: forward: 2 rounds in 0.0 s" in second


def test_each_piece_of_long_work_has_its_line(capsys):
    told = Pieces(3)
    for name in ("hash, seed 0", "dense, seed 0", "hash, seed 1"):
        told.done(name)
    first, second, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"1 of 3  hash, seed 0 \([\d.e+]+ a minute, 0 min left\)", first)
    assert second.startswith("2 of 3  dense, seed 0 (")
    assert last == "3 of 3  hash, seed 1 (the last)"


def test_the_time_left_follows_from_the_rate(monkeypatch):
    clock = iter([0.0, 120.0, 240.0])  # two minutes for each piece
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    said = []
    told = Pieces(10, said.append)
    told.done("a")
    told.done("b")
    assert said == ["1 of 10  a (0.5 a minute, 18 min left)", "2 of 10  b (0.5 a minute, 16 min left)"]
