"""Who goes where, on the device: a stable counting sort of assignments by expert, and the table of tiles.

A tile is up to BLOCK_M consecutive rows of one expert. Experts' rows follow each other without padding: the last tile
of an expert is masked, not filled up. The table has room for the most tiles that any routing can need, so that
the host, which sizes the grids, never needs the counts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def histogram_kernel(keys_ptr, counts_ptr, num, num_keys, BLOCK: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """counts[block, key]: how often each key is in each block of keys. int32."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + at, mask=at < num, other=-1).to(tl.int32)
    first = tl.program_id(1) * BLOCK_KEYS
    wanted = first + tl.arange(0, BLOCK_KEYS)
    counts = tl.sum((keys[:, None] == wanted[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + block * num_keys + wanted, counts, mask=wanted < num_keys)


@triton.jit
def place_kernel(keys_ptr, starts_ptr, order_ptr, rows_ptr, num, num_keys, BLOCK: tl.constexpr):
    """Row of each assignment: where its block's rows of that key start, and how many of them are before it."""
    block = tl.program_id(0)
    inside = tl.arange(0, BLOCK)
    at = block * BLOCK + inside
    mask = at < num
    keys = tl.load(keys_ptr + at, mask=mask, other=-1).to(tl.int32)
    before = (keys[None, :] == keys[:, None]) & (inside[None, :] < inside[:, None])
    rank = tl.sum(before.to(tl.int32), 1)
    row = tl.load(starts_ptr + block * num_keys + keys, mask=mask, other=0) + rank
    tl.store(order_ptr + row, at.to(tl.int64), mask=mask)
    tl.store(rows_ptr + at, row.to(tl.int64), mask=mask)


@triton.jit
def tile_table_kernel(
    counts_ptr, table_ptr, ends_ptr, num_experts, num_tiles,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """table (3, num_tiles): expert, first row and end of its expert's rows, per tile; expert -1 where there is none.

    ends (e,): where each expert's rows end. All int32.
    """
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < num_experts, other=0).to(tl.int32)
    ends = tl.cumsum(counts, 0)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    tile_ends = tl.cumsum(tiles, 0)
    tile_starts = tile_ends - tiles
    tile = tl.program_id(0) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    mine = (tile[:, None] >= tile_starts[None, :]) & (tile[:, None] < tile_ends[None, :])
    rows = (ends - counts)[None, :] + (tile[:, None] - tile_starts[None, :]) * BLOCK_M
    there = tile < num_tiles
    tl.store(table_ptr + tile, tl.sum(tl.where(mine, experts[None, :] + 1, 0), 1) - 1, mask=there)
    tl.store(table_ptr + num_tiles + tile, tl.sum(tl.where(mine, rows, 0), 1), mask=there)
    tl.store(table_ptr + 2 * num_tiles + tile, tl.sum(tl.where(mine, ends[None, :], 0), 1), mask=there)
    if tl.program_id(0) == 0:
        tl.store(ends_ptr + experts, ends, mask=experts < num_experts)
