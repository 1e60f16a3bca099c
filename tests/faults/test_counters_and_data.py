"""Faults of the monitor and of the data."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.faults import SkewedInput, StaleCounters, inject_counters, skewed_rows
from equipoise.layer import MoE
from equipoise.monitor.recorder import Recorder
from equipoise.monitor.watch import Watch


@pytest.mark.parametrize("attach", [Recorder, lambda layer: Watch(layer, every=1)], ids=["recorder", "watch"])
def test_counters_stand_still_or_forget(attach):
    layer = MoE(8, 8, 4)
    monitor = attach(layer)
    recorder = monitor.recorder if isinstance(monitor, Watch) else monitor

    def count(times):
        for _ in range(times):
            layer(torch.randn(100, 8))
        return recorder.flush(1)[0].num_tokens

    assert count(2) == 200
    stale = inject_counters(monitor, StaleCounters("stale"))
    assert count(2) == 0
    stale.remove()
    assert count(1) == 100
    layer(torch.randn(100, 8))
    reset = inject_counters(monitor, StaleCounters("reset"))  # what was counted is gone
    assert count(1) == 100
    layer(torch.randn(100, 8))
    reset.advance()
    assert count(0) == 0
    reset.remove()
    assert count(1) == 100
    with pytest.raises(ValueError, match=r"StaleCounters\.mode: expected stale or reset, got 'slow'"):
        StaleCounters("slow")


@given(
    domains=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    intensity=st.floats(0.01, 1.0),
    seed=st.integers(0, 1000),
)
def test_only_other_domains_are_replaced_and_only_by_the_domain(domains, intensity, seed):
    fault, domains_B = SkewedInput(domains[0], intensity, seed), torch.tensor(domains)
    rows = skewed_rows(fault, domains_B)
    moved = rows != torch.arange(len(domains))
    others = sum(domain != domains[0] for domain in domains)
    assert int(moved.sum()) == min(others, max(1, round(intensity * others))) if others else not moved.any()
    assert (domains_B[moved] != domains[0]).all()
    assert (domains_B[rows[moved]] == domains[0]).all()
    assert torch.equal(rows, skewed_rows(fault, domains_B[:, None].expand(-1, 5)))


def test_a_domain_that_is_not_there():
    with pytest.raises(
        ValueError, match=r"SkewedInput\.domain: expected a domain of the batch, one of \[1, 2\], got 7"
    ):
        skewed_rows(SkewedInput(7), torch.tensor([1, 2, 1]))
