"""What travels for one layer: rows of tokens out, with what is to be done for them, and a sum per row home."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equipoise.disk.rows import DTYPES
from equipoise.parallel.payload import Payload

TYPES = tuple(DTYPES)  # a type travels as its place in here


@dataclass(frozen=True, eq=False)
class Parcel:
    """For one rank. token_ids_U: which tokens its rows are of. errands_N3: int32, for each (row, expert) the row's
    place, the expert's slot on that rank, and the bits of the weight in fp32."""

    token_ids_U: Tensor
    errands_N3: Tensor


def parcel(token_ids_n: np.ndarray, slots_n: np.ndarray, weights_n: np.ndarray) -> Parcel:
    """Of one rank's assignments; a token that has several experts there travels once. weights_n: float32."""
    token_ids_U, places_n = np.unique(token_ids_n, return_inverse=True)
    errands_n3 = np.empty((len(token_ids_n), 3), dtype=np.int32)
    errands_n3[:, 0], errands_n3[:, 1], errands_n3[:, 2] = places_n, slots_n, weights_n.view(np.int32)
    return Parcel(torch.from_numpy(token_ids_U), torch.from_numpy(errands_n3))


def errands_of(errands_N3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row ids, int64; slots, int64; weights, fp32) of a parcel that came."""
    weights_N = errands_N3[:, 2].contiguous().view(torch.float32)
    return errands_N3[:, 0].long(), errands_N3[:, 1].long(), weights_N


def packed_like(payload: Payload, num_rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Room for rows as they travel."""
    like = payload.pack(torch.zeros(1, dim, dtype=dtype))
    return torch.empty(num_rows, like.shape[1], dtype=like.dtype)
