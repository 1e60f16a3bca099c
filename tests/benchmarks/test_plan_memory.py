"""The planner against what processes really use."""

import pytest
from benchmarks.plan_memory import cases, measure


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_the_plan_is_within_five_percent_of_what_a_process_uses(case):
    found = measure(case)
    assert abs(found.error) < 0.05, f"planned {found.planned}, measured {found.measured:,}"
