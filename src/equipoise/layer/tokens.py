"""From a batch to its real tokens, and back: padding is taken out before anything can count, route or drop it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenView:
    """The real tokens of a batch.

    x_TD: their rows. token_ids_T: their ids, or None. num_sequences: that they are of. shape: of the batch.
    kept_T: their positions in the flattened batch, None when there is no padding.
    """

    x_TD: Tensor
    token_ids_T: Tensor | None
    num_sequences: int
    shape: torch.Size
    kept_T: Tensor | None

    def pick(self, x: Tensor) -> Tensor:
        """(T, D): the rows of the real tokens out of another tensor of the batch's shape."""
        x_TD = x.reshape(-1, x.shape[-1])
        return x_TD if self.kept_T is None else x_TD[self.kept_T]

    @property
    def sequence_ids_T(self) -> Tensor:
        """int64, which sequence each token is in. Made when it is asked for: only losses do."""
        length, device = self.shape[-2], self.x_TD.device
        ids_T = torch.arange(self.num_sequences, device=device).repeat_interleave(
            length, output_size=self.num_sequences * length
        )
        return ids_T if self.kept_T is None else ids_T[self.kept_T]

    def restore(self, y_TD: Tensor) -> Tensor:
        """y in the batch's shape, 0 at padding. Its rows may have another width than x's."""
        shape = (*self.shape[:-1], y_TD.shape[-1])
        if self.kept_T is None:
            return y_TD.view(shape)
        flat = y_TD.new_zeros(self.shape[:-1].numel(), y_TD.shape[-1])
        return flat.index_copy(0, self.kept_T, y_TD).view(shape)


def tokens_of(x: Tensor, padding_mask: Tensor | None, token_ids: Tensor | None) -> TokenView:
    """Flatten x (B, S, D) or (T, D) and leave out padding. A mask costs one host synchronisation on a GPU."""
    if x.dim() not in (2, 3):
        raise ValueError(f"MoE: x must be (B, S, D) or (T, D), got {tuple(x.shape)}; flatten leading axes first")
    for name, value in (("padding_mask", padding_mask), ("token_ids", token_ids)):
        if value is not None and value.shape != x.shape[:-1]:
            raise ValueError(
                f"MoE: {name} must have the shape {tuple(x.shape[:-1])} (x without D), got {tuple(value.shape)}"
            )
    num_sequences = x.shape[0] if x.dim() == 3 else 1
    x_TD = x.reshape(-1, x.shape[-1])
    ids_T = None if token_ids is None else token_ids.reshape(-1)
    if padding_mask is None:
        return TokenView(x_TD, ids_T, num_sequences, x.shape, None)
    if padding_mask.dtype != torch.bool:
        raise ValueError(
            f"MoE: padding_mask must be bool, True at padding, got {padding_mask.dtype}; "
            "an attention mask of ones and zeros is `attention_mask == 0`"
        )
    kept_T = (~padding_mask).reshape(-1).nonzero()[:, 0]
    ids_T = None if ids_T is None else ids_T[kept_T]
    return TokenView(x_TD[kept_T], ids_T, num_sequences, x.shape, kept_T)
