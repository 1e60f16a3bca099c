"""Batches out of a token stream: shuffled and resumable for training, in order for evaluation.

Windows of seq_len inputs lie end to end in the packed stream: each token but the stream's first is a target once per
epoch. The stream's last, incomplete window is dropped, in training and in evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from equipoise.models.decoder import IGNORE
from equipoise.train.sources import DataError
from equipoise.train.tokens import TokenData, TokenStream, prepare

__all__ = ["IGNORE", "Batch", "Loader", "TokenData", "TokenStream", "eval_batches", "eval_windows", "prepare"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs and what is to be predicted from them.

    tokens_BS: int64. targets_BS: int64, the next token of each; -100 means none. domains_BS: int64, the domain of each
    target. The batches of this file have no -100: their windows are full.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    domains_BS: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(self.tokens_BS.to(device), self.targets_BS.to(device), self.domains_BS.to(device))


@final
class Loader:
    """Endless training batches. Each epoch visits all windows once, in an order drawn from `seed` and the epoch.

    The batch that an epoch ends in is filled from the next one. Ranks share each global batch of world * batch_size
    windows: rank r gets rows r * batch_size and on, so the global batches do not depend on how they are divided.
    Raises DataError for a bad argument, and when the stream has fewer windows than one global batch.
    """

    def __init__(
        self, stream: TokenStream, batch_size: int, seq_len: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        if not 0 <= rank < world:
            raise DataError(f"rank is {rank} and world is {world}; expected 0 <= rank < world.")
        if seed < 0:
            raise DataError(f"seed is {seed}; expected 0 or more.")
        self._num_windows = _num_windows(stream, batch_size, seq_len, at_least=batch_size * world)
        self._stream = stream
        self._batch_size = batch_size
        self._seq_len = seq_len
        self._seed = seed
        self._rank = rank
        self._world = world
        self._position = 0  # windows that all ranks together have taken, over all epochs
        self._order = (-1, np.empty(0, dtype=np.int64))  # the last epoch asked for, and its order of windows

    @property
    def epoch(self) -> int:
        """Number of epochs that are complete."""
        return self._position // self._num_windows

    def next_batch(self) -> Batch:
        """The next batch of this rank."""
        first = self._position + self._rank * self._batch_size
        windows_B = np.array([self._window(number) for number in range(first, first + self._batch_size)])
        self._position += self._batch_size * self._world
        return _gather(self._stream, windows_B, self._seq_len)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.next_batch()

    def state_dict(self) -> dict[str, int | str]:
        """Where the loader stands, in plain numbers. The same on all ranks; fits any world and batch size."""
        return {
            "epoch": self.epoch,
            "position": self._position % self._num_windows,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Go to where `state_dict` was taken. Raises DataError when it belongs to other data, seq_len or seed."""
        if state.get("fingerprint") != self._fingerprint:
            raise DataError(
                f"the loader's state is of '{state.get('fingerprint')}', this loader is of '{self._fingerprint}' "
                "(tokens, seq_len, seed). Resume with the corpus, tokenizer, seq_len and seed of the first run."
            )
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position < self._num_windows:
            raise DataError(
                f"the loader's state says epoch {epoch}, position {position}; expected an epoch of 0 or more and a "
                f"position in [0, {self._num_windows}). Resume from an older checkpoint."
            )
        self._position = epoch * self._num_windows + position

    @property
    def _fingerprint(self) -> str:
        return f"{self._stream.fingerprint[:16]}-{self._seq_len}-{self._seed}"

    def _window(self, number: int) -> int:
        epoch, position = divmod(number, self._num_windows)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(self._num_windows))
        return int(self._order[1][position])


def eval_batches(stream: TokenStream, batch_size: int, seq_len: int, max_batches: int | None = None) -> Iterator[Batch]:
    """All windows in order; the last batch may have fewer rows. The same batches each time.

    max_batches: take only so many, from windows spread evenly over the stream, and so over its domains.
    Raises DataError, before the first batch, for a bad argument and for a stream without one full window.
    """
    windows = eval_windows(stream, batch_size, seq_len, max_batches)
    return (_gather(stream, windows[i : i + batch_size], seq_len) for i in range(0, len(windows), batch_size))


def eval_windows(stream: TokenStream, batch_size: int, seq_len: int, max_batches: int | None = None) -> np.ndarray:
    """int64 (W,): the windows that `eval_batches` takes, in its order; window w begins at token w * seq_len."""
    if max_batches is not None and max_batches < 1:
        raise DataError(f"max_batches is {max_batches}; expected 1 or more, or None for all.")
    total = _num_windows(stream, batch_size, seq_len, at_least=1)
    count = total if max_batches is None else min(total, max_batches * batch_size)
    return np.arange(count, dtype=np.int64) * total // count


def _num_windows(stream: TokenStream, batch_size: int, seq_len: int, at_least: int) -> int:
    if batch_size < 1 or seq_len < 1:
        raise DataError(f"batch_size is {batch_size} and seq_len is {seq_len}; expected 1 or more of each.")
    needed = at_least * seq_len + 1  # the last window's last target
    if stream.num_tokens < needed:
        raise DataError(
            f"the stream has {stream.num_tokens} tokens; {needed} are needed for {at_least} window(s) of {seq_len} and "
            "a target. Use more text, a smaller batch_size or seq_len, or fewer ranks (for validation, a larger "
            "val_fraction)."
        )
    return (stream.num_tokens - 1) // seq_len


def _gather(stream: TokenStream, windows_B: np.ndarray, seq_len: int) -> Batch:
    positions = windows_B[:, None] * seq_len + np.arange(seq_len + 1)
    tokens = torch.from_numpy(stream.tokens_N[positions].astype(np.int64))
    domains_BS = torch.from_numpy(stream.domains_of(positions[:, 1:]))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), domains_BS)
