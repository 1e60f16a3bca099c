"""Sorting assignments by expert and cutting the rows into tiles, without the host ever knowing the counts.

`sort_by_key` is the twin of `ops.ragged.sort_on_device`; `tiles_of` makes the table that the grouped products read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.ops.triton.blocks import Cut, cut_for, shared_memory
from equipoise.ops.triton.needs import require

_SORT_BLOCK = 128  # keys are compared with each other within a block: 16 K comparisons
_KEYS_BLOCK = 64
_TILES_BLOCK = 16


@dataclass(frozen=True, eq=False)
class Tiles:
    """table: int32 (3, num_tiles), expert (-1: none), first row, end of the expert's rows. ends_e: int32."""

    table: Tensor
    ends_e: Tensor
    cut: Cut

    @property
    def num_tiles(self) -> int:
        """The most that any routing of so many rows can need: what grids are sized for."""
        return self.table.shape[1]


def most_tiles(num_rows: int, num_experts: int, rows_per_tile: int) -> int:
    """An upper bound of sum over experts of ceil(rows of it / rows_per_tile), whatever the routing."""
    return num_rows // rows_per_tile + min(num_experts, num_rows)


def tiles_of(counts_e: Tensor, num_rows: int, itemsize: int, cut: Cut | None = None) -> Tiles:
    """counts_e: int64 or int32, rows per expert; num_rows: R > 0, at least their sum. cut: None for `cut_for`'s."""
    from equipoise.ops.triton.kernels.order import tile_table_kernel

    num_experts = counts_e.shape[0]
    cut = cut or cut_for(num_rows, num_experts, itemsize, shared_memory(counts_e.device))
    num_tiles = most_tiles(num_rows, num_experts, cut.rows)
    table = torch.empty(3, num_tiles, dtype=torch.int32, device=counts_e.device)
    ends_e = torch.empty(num_experts, dtype=torch.int32, device=counts_e.device)
    tile_table_kernel[(-(-num_tiles // _TILES_BLOCK),)](
        counts_e,
        table,
        ends_e,
        num_experts,
        num_tiles,
        BLOCK_M=cut.rows,
        BLOCK_E=power_of_two(num_experts),
        BLOCK_TILES=_TILES_BLOCK,
    )
    return Tiles(table, ends_e, cut)


@torch.library.custom_op("equipoise::triton_sort", mutates_args=())
def _sort(keys_N: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    require(keys_N.device)
    from equipoise.ops.triton.kernels.order import histogram_kernel, place_kernel

    num, device = keys_N.shape[0], keys_N.device
    order_R, rows_N = torch.empty_like(keys_N), torch.empty_like(keys_N)
    num_blocks = -(-num // _SORT_BLOCK)
    counts_bk = torch.empty(num_blocks, num_keys, dtype=torch.int32, device=device)
    if num == 0:
        return order_R, rows_N, torch.zeros(num_keys, dtype=torch.int64, device=device)
    grid = (num_blocks, -(-num_keys // _KEYS_BLOCK))
    histogram_kernel[grid](keys_N, counts_bk, num, num_keys, BLOCK=_SORT_BLOCK, BLOCK_KEYS=_KEYS_BLOCK)
    until_bk = counts_bk.cumsum(0)  # int64
    counts = until_bk[-1].clone()
    starts_bk = (until_bk - counts_bk + (counts.cumsum(0) - counts)).to(torch.int32)
    place_kernel[(num_blocks,)](keys_N, starts_bk, order_R, rows_N, num, num_keys, BLOCK=_SORT_BLOCK)
    return order_R, rows_N, counts


@_sort.register_fake
def _(keys_N: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(keys_N), torch.empty_like(keys_N), keys_N.new_empty(num_keys)


def sort_by_key(keys_N: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order_R, rows_N, counts), int64: which assignment is in each row, the row of each assignment, rows by key.

    keys_N: int64 in [0, num_keys), contiguous. Equal keys keep their order. It never waits for the device.
    Raises ValueError where the kernels can't run, see `needs.require`.
    """
    sorted_: tuple[Tensor, Tensor, Tensor] = _sort(keys_N.contiguous(), num_keys)
    return sorted_


def power_of_two(at_least: int) -> int:
    """The smallest power of two that is not below it."""
    return 1 << max(0, at_least - 1).bit_length()
