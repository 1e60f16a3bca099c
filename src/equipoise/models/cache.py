"""Key/value caches for decoding: the protocol that attention uses, and one preallocated contiguous cache.

A contiguous cache is for rows of one length, or left-padded to it. A serving engine has its own, in blocks.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from equipoise.models.attend import WHOLE, Sight, attend, attention_mask, token_positions
from equipoise.models.config import DecoderConfig
from equipoise.models.mamba import MambaState


class KVCache(Protocol):
    """What attention and the decoder need of a cache: it says where new tokens stand and what each of them sees."""

    def longest(self, num_new: int) -> int:
        """Tokens of the longest sequence after `num_new` new ones, the cached ones included."""
        ...

    def place(self, num_new: int, padding_BK: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Positions of the new tokens, int64 (B or 1, S), and the mask that `attend` will be given."""
        ...

    def attend(
        self, layer: int, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, sight: Sight
    ) -> Tensor:
        """Keep the S new keys and values of one layer; what the new queries see in all of theirs, (B, H, S, D)."""
        ...

    def advance(self, num_tokens: int) -> None:
        """Count the S new tokens as kept. Called once per forward, after the last layer."""
        ...


class ContiguousCache:
    """One preallocated block of (L, B, H, max_len, D) for the keys and one for the values. Inference only.

    L counts the layers with attention. Of the others it keeps a state of fixed size (`KeepsStates`). A forward that
    fails half-way leaves `length` and states as they were, so it can be repeated.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        heads, width = config.cache_shape
        attending = [layer for layer in range(config.num_layers) if layer not in config.mamba_layer_ids]
        self._slots = {layer: slot for slot, layer in enumerate(attending)}
        shape = (len(attending), batch_size, heads, max_len, width)
        self._keys_LBHSD = torch.zeros(shape, dtype=dtype, device=device)
        self._values_LBHSD = torch.zeros(shape, dtype=dtype, device=device)
        self._states: dict[int, MambaState] = {}
        self._coming: dict[int, MambaState] = {}
        self._batch_size = batch_size
        self._length = 0

    @property
    def length(self) -> int:
        """Slots filled by earlier forwards."""
        return self._length

    @property
    def max_len(self) -> int:
        """Slots there are."""
        return self._keys_LBHSD.shape[3]

    def longest(self, num_new: int) -> int:
        """Slots after `num_new` more."""
        return self._length + num_new

    def place(self, num_new: int, padding_BK: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Positions and mask. padding_BK: bool (B, length + S), True = padding, on either side."""
        positions_BS = token_positions(num_new, self._length, padding_BK, device)
        return positions_BS, attention_mask(num_new, self._length, padding_BK, device)

    def attend(
        self, layer: int, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, sight: Sight = WHOLE
    ) -> Tensor:
        """Keep the new keys and values, and attend to all so far."""
        k_BHKD, v_BHKD = self.update(layer, k_BHSD, v_BHSD)
        return attend(q_BHSD, k_BHKD, v_BHKD, mask, sight)

    def update(self, layer: int, k_BHSD: Tensor, v_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of one layer into the next slots; return views of all so far.

        Raises ValueError when the cache is full, when batch, heads or dtype differ from those it was made for, or
        when the keys carry gradients.
        """
        end, slot = self._length + k_BHSD.shape[2], self._slots[layer]
        self._check(k_BHSD, end)
        keys_BHSD, values_BHSD = self._keys_LBHSD[slot, :, :, :end], self._values_LBHSD[slot, :, :, :end]
        keys_BHSD[:, :, self._length :] = k_BHSD
        values_BHSD[:, :, self._length :] = v_BHSD
        return keys_BHSD, values_BHSD

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` new slots as filled, and let the states of this forward be those that the next finds."""
        self._length += num_tokens
        self._states |= self._coming
        self._coming = {}

    def state(self, layer: int) -> MambaState | None:
        """What the tokens so far left behind in a layer without attention; None at the beginning."""
        return self._states.get(layer)

    def keep(self, layer: int, state: MambaState) -> None:
        """Take a layer's state, which counts from `advance` on. Raises ValueError for another batch."""
        if state.h_BIN.shape[0] != self._batch_size:
            raise ValueError(
                f"cache: expected a state of batch {self._batch_size}, got {state.h_BIN.shape[0]}. Make one cache per "
                "batch, from the config of the model that uses it."
            )
        self._coming[layer] = state

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
