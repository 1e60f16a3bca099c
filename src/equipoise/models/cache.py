"""Key/value caches for decoding: the protocol that attention uses, and one preallocated contiguous cache.

A cache holds slots; the new tokens of a forward take the next ones. It knows nothing of positions or padding.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from equipoise.models.config import DecoderConfig


class KVCache(Protocol):
    """What attention and the decoder need of a cache.

    length: slots that hold the tokens of earlier forwards; the same for every row of the batch. Rows of different
    lengths are left-padded, and a padding mask of (B, length + S) says which slots are padding.
    """

    @property
    def length(self) -> int: ...  # noqa: D102 - described by the class

    def update(self, layer: int, k_BHSD: Tensor, v_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the S new keys and values of one layer; return all of them, (B, H, length + S, D), new ones last."""
        ...

    def advance(self, num_tokens: int) -> None:
        """Count the S new slots as filled. Called once per forward, after the last layer."""
        ...


class ContiguousCache:
    """One preallocated block of (L, B, H, max_len, D) for the keys and one for the values. Inference only.

    A forward that fails half-way leaves `length` as it was, so it can be repeated.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_layers, batch_size, config.kv_heads, max_len, config.head_size)
        self._keys_LBHSD = torch.zeros(shape, dtype=dtype, device=device)
        self._values_LBHSD = torch.zeros(shape, dtype=dtype, device=device)
        self._length = 0

    @property
    def length(self) -> int:
        """Slots filled by earlier forwards."""
        return self._length

    @property
    def max_len(self) -> int:
        """Slots there are."""
        return self._keys_LBHSD.shape[3]

    def update(self, layer: int, k_BHSD: Tensor, v_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of one layer into the next slots; return views of all so far.

        Raises ValueError when the cache is full, when batch, heads or dtype differ from those it was made for, or
        when the keys carry gradients.
        """
        end = self._length + k_BHSD.shape[2]
        self._check(k_BHSD, end)
        keys_BHSD, values_BHSD = self._keys_LBHSD[layer, :, :, :end], self._values_LBHSD[layer, :, :, :end]
        keys_BHSD[:, :, self._length :] = k_BHSD
        values_BHSD[:, :, self._length :] = v_BHSD
        return keys_BHSD, values_BHSD

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` new slots as filled."""
        self._length += num_tokens

    def _check(self, k_BHSD: Tensor, end: int) -> None:
        if end > self.max_len:
            raise ValueError(
                f"cache: {end} slots needed, {self.max_len} allocated. Make the cache with max_len >= {end}, "
                "or generate fewer tokens."
            )
        expected = (self._keys_LBHSD.shape[1], self._keys_LBHSD.shape[2], self._keys_LBHSD.shape[4])
        actual = (k_BHSD.shape[0], k_BHSD.shape[1], k_BHSD.shape[3])
        if actual != expected:
            raise ValueError(
                f"cache: expected keys of (batch, heads, head_dim) {expected}, got {actual}. "
                "Make one cache per batch, from the config of the model that uses it."
            )
        if k_BHSD.dtype != self._keys_LBHSD.dtype:
            raise ValueError(
                f"cache: expected keys in {self._keys_LBHSD.dtype}, got {k_BHSD.dtype}. "
                f"Make the cache with dtype={k_BHSD.dtype}."
            )
        if k_BHSD.requires_grad:
            raise ValueError(
                "cache: expected keys without gradients, got keys that require them. A cache is for inference: "
                "wrap the call in torch.inference_mode(), or train without a cache."
            )
