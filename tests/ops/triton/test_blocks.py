"""How products are cut: pure arithmetic, without Triton."""

import pytest

from equipoise.ops.triton.blocks import Blocks, cut_for

KIB = 1024


@pytest.mark.parametrize(("mean", "rows"), [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 128), (4000, 128)])
def test_rows_of_a_tile_follow_the_mean_load(mean, rows):
    cut = cut_for(mean * 8, 8, 2, 225 * KIB)
    assert {one.rows for one in (cut.up, cut.down, cut.grad_a, cut.grad_x)} == {rows} == {cut.rows}


def test_stages_are_what_the_shared_memory_holds():
    """A stage of 128 + 2 x 128 rows of 64 numbers of two bytes takes 48 KiB."""
    blocks = Blocks(128, 128, 64, 8, 4)
    stages = [blocks.fitting(2, 2, shared * KIB).stages for shared in (30, 48, 95, 97, 191, 192, 500)]
    assert stages == [1, 1, 1, 2, 3, 4, 4]
