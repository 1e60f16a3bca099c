"""Keys and values in fixed blocks, and one forward over pieces of many sequences in a single row of tokens.

`PagedKV` is the memory; `Ragged` is what one forward sees of it. Which block belongs to whom is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from equipoise.models.attend import WHOLE, Sight, attend, attend_with_sinks, attention_mask
from equipoise.models.config import DecoderConfig
from equipoise.models.mamba import KeepsStates
from equipoise.ops.native.paged import Blocks, paged_attention, unsupported
from equipoise.serve.states import Apart, States

_CACHED_BYTES = 2**22  # keys and values of one layer; measured for 8 heads of 64


class PagedKV:
    """Keys and values of num_blocks * block_size tokens, slot = block * block_size + offset.

    both_LS2HD: a slot's key and value lie side by side, so that one copy brings both. L counts the layers with
    attention.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        attending = _attending(config)
        self.place_of = {layer: place for place, layer in enumerate(attending)}
        shape = (len(attending), num_blocks * block_size, 2, *config.cache_shape)
        self.both_LS2HD = torch.zeros(shape, dtype=dtype, device=device)
        self.block_size = block_size

    @property
    def keys_LSHD(self) -> Tensor:
        """Of all layers and slots."""
        return self.both_LS2HD[:, :, 0]

    @property
    def values_LSHD(self) -> Tensor:
        """Of all layers and slots."""
        return self.both_LS2HD[:, :, 1]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.both_LS2HD.device

    @staticmethod
    def bytes_per_block(config: DecoderConfig, block_size: int, dtype: torch.dtype) -> int:
        """Memory of one block in all layers."""
        heads, width = config.cache_shape
        return 2 * len(_attending(config)) * block_size * heads * width * dtype.itemsize

    def clear(self, slots: Sequence[int]) -> None:
        """Put zeros."""
        if slots:
            self.both_LS2HD.index_fill_(1, torch.tensor(slots, device=self.device), 0)


def _attending(config: DecoderConfig) -> list[int]:
    return [layer for layer in range(config.num_layers) if layer not in config.mamba_layer_ids]


class Span(NamedTuple):
    """Tokens of one sequence in this forward: from position `start` on, so many. blocks: of all its tokens so far.

    slot: where its states are, in a model that has some.
    """

    blocks: Sequence[int]
    start: int
    num_tokens: int
    slot: int | None = None

    @property
    def end(self) -> int:
        """Tokens of the sequence after this forward."""
        return self.start + self.num_tokens


@dataclass(frozen=True, eq=False)
class _Chunk:
    """A piece of a prompt. rows: its tokens in the row. end: tokens that it may see. blocks_M: where they are; None
    where they are its own."""

    rows: slice
    end: int
    blocks_M: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class _Copied:
    """B sequences of similar length with one new token each, whose blocks are copied together. The twin of `_InPlace`.

    rows_B: in the row; None where they are all of it, in order. blocks_N: M of each, one sequence after the other.
    block_size: of a block. mask_B11K: 0 for what is theirs, else -inf. ends_B: how many of the keys are theirs.
    """

    rows_B: Tensor | None
    blocks_N: Tensor
    block_size: int
    mask_B11K: Tensor
    ends_B: Tensor

    def attend(self, q_HBD: Tensor, both_S2HD: Tensor, sight: Sight) -> Tensor:
        """(query heads, B, D). The query heads of a key/value head are its queries: no copy of keys for each."""
        (num_heads, B, D), kv_heads = q_HBD.shape, both_S2HD.shape[2]
        k, v = _read(both_S2HD, self.blocks_N, self.block_size, B)
        q = q_HBD.transpose(0, 1).reshape(B, kv_heads, num_heads // kv_heads, D)
        mask = self._mask_in(sight.window)
        if sight.sinks_H is None:
            y = attend(q, k, v, mask)
        else:
            y = attend_with_sinks(q, k, v, mask, sight.sinks_H.view(1, kv_heads, -1, 1))
        return y.reshape(B, num_heads, D).transpose(0, 1)

    def _mask_in(self, window: int | None) -> Tensor:
        """The mask with only the last `window` of theirs."""
        if window is None or window >= self.mask_B11K.shape[-1]:
            return self.mask_B11K
        too_early_BK = torch.arange(self.mask_B11K.shape[-1], device=self.ends_B.device) < self.ends_B[:, None] - window
        return self.mask_B11K.masked_fill(too_early_BK[:, None, None], -torch.inf)


@dataclass(frozen=True, eq=False)
class _InPlace:
    """B sequences with one new token each, whose keys and values native code reads where they lie. rows_B: as above."""

    rows_B: Tensor | None
    where: Blocks

    def attend(self, q_HBD: Tensor, both_S2HD: Tensor, sight: Sight) -> Tensor:
        """(query heads, B, D)."""
        y_BHD = paged_attention(q_HBD.transpose(0, 1), both_S2HD, self.where, sight.window, sight.sinks_H)
        return y_BHD.transpose(0, 1)


class Ragged:
    """A `KVCache` for one forward over spans of many sequences, one after the other in a row of tokens (1, T).

    states: of a model with Mamba layers. They change at `commit`; keys and values do at once, as a forward that is
    repeated writes the same ones.
    """

    def __init__(self, kv: PagedKV, spans: Sequence[Span], states: States | None = None) -> None:
        self._kv = kv
        self._apart = None if states is None else Apart(states, [_piece(span) for span in spans])
        self._longest = max((span.end for span in spans), default=0)
        positions: list[int] = []
        slots: list[int] = []
        self._chunks: list[_Chunk] = []
        single: list[tuple[int, Span]] = []
        for span in spans:
            row = len(positions)
            positions += range(span.start, span.end)
            slots += _new_slots(span, kv.block_size)
            if span.num_tokens == 1:
                single.append((row, span))
            else:
                self._chunks.append(self._chunk(row, span))
        self._positions_1T = torch.tensor([positions], device=kv.device)
        self._slots_T = torch.tensor(slots, device=kv.device)
        self._decoding = _decoding(kv, single, len(positions))
        kv.clear([slot for span in spans for slot in _unwritten(span, kv.block_size)])

    def longest(self, num_new: int) -> int:
        """Tokens of the longest sequence."""
        return self._longest

    def place(self, num_new: int, padding_BK: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Positions; there is no one mask. Raises ValueError for other tokens than those of the spans."""
        if padding_BK is not None or num_new != self._positions_1T.shape[1]:
            raise ValueError(
                f"Ragged: expected the {self._positions_1T.shape[1]} tokens of its spans without padding, got {num_new}"
            )
        return self._positions_1T, None

    def attend(
        self, layer: int, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, sight: Sight = WHOLE
    ) -> Tensor:
        """Keep the new keys and values, then let each span see what is its own."""
        both_S2HD = self._kv.both_LS2HD[self._kv.place_of[layer]]
        both_S2HD.index_copy_(0, self._slots_T, torch.cat((k_BHSD, v_BHSD)).permute(2, 0, 1, 3))
        if len(self._decoding) == 1 and self._decoding[0].rows_B is None:
            return self._decoding[0].attend(q_BHSD[0], both_S2HD, sight)[None]
        out_BHSD = torch.empty_like(q_BHSD)
        for chunk in self._chunks:
            if chunk.blocks_M is None:
                k, v = k_BHSD[:, :, chunk.rows], v_BHSD[:, :, chunk.rows]
            else:
                both = _read(both_S2HD, chunk.blocks_M, self._kv.block_size, 1)
                k, v = (each[:, :, : chunk.end] for each in both)
            out_BHSD[:, :, chunk.rows] = attend(q_BHSD[:, :, chunk.rows], k, v, chunk.mask, sight)
        for group in self._decoding:
            out_BHSD[0, :, group.rows_B] = group.attend(q_BHSD[0, :, group.rows_B], both_S2HD, sight)
        return out_BHSD

    def mix(self, layer: int, run: Callable[[Tensor, KeepsStates], Tensor], x_1TD: Tensor) -> Tensor:
        """A Mamba layer's part: each span with its own state. Raises ValueError without states."""
        if self._apart is None:
            raise ValueError(f"Ragged: expected states for layer {layer}, which is Mamba's, got none. Pass states=.")
        return self._apart.mix(layer, run, x_1TD)

    def advance(self, num_tokens: int) -> None:
        """Nothing to do: the spans were decided before."""

    def commit(self) -> None:
        """All that follows from the forward has been computed: its states are now those of the sequences."""
        if self._apart is not None:
            self._apart.commit()

    def _chunk(self, row: int, span: Span) -> _Chunk:
        rows = slice(row, row + span.num_tokens)
        if span.start == 0:
            return _Chunk(rows, span.end, None, None)
        device = self._kv.device
        blocks_M = torch.tensor(span.blocks[: _num_blocks(span, self._kv.block_size)], device=device)
        return _Chunk(rows, span.end, blocks_M, attention_mask(span.num_tokens, span.start, None, device))


def _read(both_S2HD: Tensor, blocks_N: Tensor, block_size: int, B: int) -> tuple[Tensor, Tensor]:
    """Copy blocks of B sequences together: keys and values, (B, H, K, D) each."""
    _, _, H, D = both_S2HD.shape
    read_NX = both_S2HD.view(-1, block_size * 2 * H * D).index_select(0, blocks_N)
    keys, values = read_NX.view(B, -1, 2, H, D).permute(2, 0, 3, 1, 4).unbind()
    return keys, values


def _decoding(kv: PagedKV, single: Sequence[tuple[int, Span]], num_rows: int) -> list[_Copied] | list[_InPlace]:
    """The sequences with one new token: (place in the row, span) of each."""
    if not single:
        return []
    if not unsupported(kv.both_LS2HD.shape[-1], kv.both_LS2HD.dtype, kv.device):
        return [_in_place(kv, single, num_rows)]
    return [_copied(kv, group, num_rows) for group in _by_length(single, kv.block_size, _most_blocks(kv))]


def _in_place(kv: PagedKV, single: Sequence[tuple[int, Span]], num_rows: int) -> _InPlace:
    blocks_BM, ends_B, rows_B, _ = _placed(kv, single, num_rows)
    return _InPlace(rows_B, Blocks(blocks_BM, ends_B, kv.block_size))


def _copied(kv: PagedKV, group: Sequence[tuple[int, Span]], num_rows: int) -> _Copied:
    blocks_BM, ends_B, rows_B, width = _placed(kv, group, num_rows)
    hidden_BK = torch.arange(width * kv.block_size, device=kv.device) >= ends_B[:, None]
    mask_BK = torch.zeros(hidden_BK.shape, dtype=kv.both_LS2HD.dtype, device=kv.device)
    mask_B11K = mask_BK.masked_fill_(hidden_BK, -torch.inf)[:, None, None]
    return _Copied(rows_B, blocks_BM.view(-1), kv.block_size, mask_B11K, ends_B)


def _placed(
    kv: PagedKV, single: Sequence[tuple[int, Span]], num_rows: int
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """(blocks of each (B, M), filled up; tokens of each (B,); their places in the row, None for all of it; M)."""
    width = max(_num_blocks(span, kv.block_size) for _, span in single)
    blocks_BM = torch.tensor([_padded(span.blocks, width) for _, span in single], device=kv.device)
    ends_B = torch.tensor([span.end for _, span in single], device=kv.device)
    rows = [row for row, _ in single]
    rows_B = None if rows == list(range(num_rows)) else torch.tensor(rows, device=kv.device)
    return blocks_BM, ends_B, rows_B, width


def _piece(span: Span) -> tuple[int, int, int]:
    if span.slot is None:
        raise ValueError(f"Ragged: expected a slot for each span of a model with states, got none for {span}")
    return span.slot, span.start, span.num_tokens


def _num_blocks(span: Span, block_size: int) -> int:
    """Blocks that its tokens so far are in."""
    return -(-span.end // block_size)


def _new_slots(span: Span, block_size: int) -> list[int]:
    """Of the span's tokens."""
    return [span.blocks[at // block_size] * block_size + at % block_size for at in range(span.start, span.end)]


def _unwritten(span: Span, block_size: int) -> range:
    """The slots after the span's last token in a block that it is the first to write to.

    Whoever had the block may have left NaN there, and a masked NaN is still NaN in a sum.
    """
    last = (span.end - 1) // block_size
    if span.start > last * block_size:
        return range(0)
    first = span.blocks[last] * block_size
    return range(first + span.end - last * block_size, first + block_size)


def _most_blocks(kv: PagedKV) -> int:
    """Blocks to copy together: on a CPU so many that the copy is still in its cache when it is used."""
    if kv.device.type != "cpu":
        return 2**31
    return _CACHED_BYTES // (kv.block_size * kv.both_LS2HD.shape[2:].numel() * kv.both_LS2HD.itemsize)


def _padded(blocks: Sequence[int], width: int) -> list[int]:
    """So many blocks; its own again where it has fewer, as masked values count when they are NaN."""
    return [*blocks[:width], *[blocks[-1]] * (width - len(blocks))]


def _by_length(single: Sequence[tuple[int, Span]], block_size: int, most: int) -> list[list[tuple[int, Span]]]:
    """Groups in which no sequence has more than twice the blocks of another: what is padded is less than half.

    most: blocks of a group, unless one sequence alone has more.
    """
    by_length: dict[int, list[tuple[int, Span]]] = {}
    for row, span in single:
        by_length.setdefault(_num_blocks(span, block_size).bit_length(), []).append((row, span))
    groups = []
    for alike in by_length.values():
        size = max(1, most // max(_num_blocks(span, block_size) for _, span in alike))
        groups += [alike[start : start + size] for start in range(0, len(alike), size)]
    return groups
