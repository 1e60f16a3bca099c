"""The comparison of monitors: the count by hand is right, equipoise agrees with it, and what is missing is named."""

import sys

import pytest
import torch
from benchmarks.experts_memory import SMALL, kept
from benchmarks.monitors import main, rows_of
from benchmarks.monitors_observers import Seen, brute_force, equipoise
from benchmarks.monitors_worlds import K, always_second, dead_tail, long_run, random_world

from equipoise.hf import NAME


@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3"])
def test_equipoise_counts_as_the_loops_do(family):
    world = random_world(family)
    truth, seen = brute_force(world), equipoise(world)
    assert (truth.layers, truth.experts, truth.tokens) == (2, 16, 20 * 2 * 16)
    assert truth.choices == 2 * truth.tokens * K
    assert seen.differs(truth) == ()
    assert seen.verdict == "healthy"
    [by_hand, ours] = rows_of(world, ["equipoise"])
    assert by_hand[:2] == (family, "loops")
    assert ours[-1] == "nothing"


@pytest.mark.parametrize("family", ["Mixtral", "Olmoe"])
def test_the_failures_are_what_their_names_say(family):
    second, tail = always_second(family), dead_tail(family)
    truth = brute_force(second)
    assert all(layer[7] == truth.tokens and min(layer[:7]) > 0 for layer in truth.counts)
    assert truth.dead == ()
    truth = brute_force(tail)
    assert truth.dead == ("0:6", "0:7", "1:6", "1:7")
    seen = equipoise(tail)
    assert seen.differs(truth) == ()
    assert "dead_experts" in seen.verdict
    truth = brute_force(long_run(family, num_batches=4, sequences=64))
    assert truth.counts[0][0] > 0.85 * truth.tokens


def test_what_is_wrong_is_named():
    truth = Seen(1, 2, 3, ((3, 0),), ("0:1",), "")
    assert Seen(1, 2, None, ((3, 0),), None, "").differs(truth) == ()
    assert Seen(2, 1, 4, ((2, 1),), (), "").differs(truth) == ("layers", "experts", "tokens", "counts", "dead")


@pytest.mark.parametrize(("module", "package"), [("moewatch", "moewatch"), ("plumb", "plumb-moe")])
def test_a_monitor_that_is_not_installed_is_named(module, package, monkeypatch, capsys):
    """Before anything is measured."""
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "argv", ["monitors", "--monitors", "equipoise", module])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert f"pip install {package}==0.1.0, or leave it out with --monitors" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.family)
def test_equipoise_keeps_the_least_for_backward(case):
    bytes_kept = kept(case, torch.float32)
    assert min(bytes_kept, key=bytes_kept.get) == NAME
    T, D, F, rows = case.num_tokens, case.dim, case.hidden_dim, case.num_tokens * case.top_k
    index = 8 * (3 * rows + case.num_experts)  # each row's token and choice, each choice's row, rows by expert
    assert bytes_kept[NAME] <= 4 * (T * D + 2 * rows * F + rows) + index + 8
