"""Which tokens of a forward are real, from the attention mask that the caller gave to the model.

One `RealTokens` listens to one decoder (the innermost module that takes tokens and an `attention_mask`) while it runs,
also under `generate`, where the mask covers the cache and the input is only what is new. It changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equipoise.ops.count import inside_backward

TOKENS = ("input_ids", "inputs_embeds")
MASK = "attention_mask"


class Arguments:
    """The parameters of a module's forward by name, however a call passes them."""

    def __init__(self, module: nn.Module) -> None:
        # of the class: libraries replace `forward` on instances by functions that take anything
        self.names = tuple(inspect.signature(type(module).forward).parameters)[1:]

    def value(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What this call passes for the parameter; None if it passes nothing."""
        if name in kwargs:
            return kwargs[name]
        index = self.names.index(name) if name in self.names else len(args)
        return args[index] if index < len(args) else None


def takes_mask(module: nn.Module) -> bool:
    """Whether the module is called with tokens and a padding mask, as decoders are (and their layers are not)."""
    names = Arguments(module).names
    return MASK in names and any(name in names for name in TOKENS)


def recomputing() -> bool:
    """True in a forward that is run again for its gradients. A compiled graph is asked by the operators in it."""
    return not torch.compiler.is_compiling() and inside_backward()


class RealTokens:
    """The real tokens of the forward that is in progress in one decoder.

    index_T: int64, the positions of the real tokens among the B * S flattened ones; None: all are real.
    shape: (B, S) of that forward, None outside.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder = decoder
        self._arguments = Arguments(decoder)
        self.index_T: Tensor | None = None
        self.shape: tuple[int, int] | None = None

    def attach(self) -> list[RemovableHandle]:
        """Listen to the decoder until the handles are removed."""
        return [
            self._decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            self._decoder.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = self._arguments.value(MASK, args, kwargs)
        tokens = [self._arguments.value(name, args, kwargs) for name in TOKENS]
        shapes = [tuple(value.shape[:2]) for value in tokens if value is not None]
        if mask is None or not shapes or recomputing():
            return
        self.shape = shapes[0]
        with torch.no_grad():
            real_BS = real_tokens(mask, self.shape, _cache(args, kwargs))
            if real_BS is not None:
                self.index_T = real_BS.reshape(-1).nonzero().squeeze(1)  # a GPU waits here, once per forward

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.index_T = self.shape = None


def _cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The cache of this call: what can tell its length. It is `past_key_values` or, from transformers 5.24, `cache`."""
    return next((value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")), None)


def real_tokens(mask: Any, shape: tuple[int, int], cache: Any = None) -> Tensor | None:
    """bool (B, S): which of the new tokens are real; None when the mask says nothing.

    mask: (B, W) with non-zero for real tokens, W >= S covering the cache and the new tokens; or a causal mask
        (B or 1, heads, S, W), bool or added to the scores, in which a real token sees itself; or a dict of such, by
        kind of layer. shape: (B, S). cache: where W may be longer than what is filled, tells how much is.
    Raises ValueError for anything else.
    """
    if isinstance(mask, Mapping):
        mask = _most_telling(mask)
    if mask is None:
        return None
    B, S = shape
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == B and mask.shape[1] >= S:
        return mask.index_select(1, _columns(mask, S, cache)).ne(0)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[0] in (1, B) and mask.shape[2] == S <= mask.shape[3]:
        columns_S = _columns(mask, S, cache).view(1, S, 1)
        itself_BS = mask[:, 0].gather(2, columns_S.expand(mask.shape[0], S, 1)).squeeze(2).expand(B, S)
        return itself_BS.gt(-1.0) if itself_BS.is_floating_point() else itself_BS.ne(0)
    got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(
        f"attention_mask: expected shape ({B}, {S} or more) or ({B}, heads, {S}, {S} or more) for {S} new tokens in "
        f"{B} sequences, got {got}; pass the mask that the tokenizer returns, or none if nothing is padding"
    )


def _most_telling(masks: Mapping[Any, Any]) -> Any:
    """Of the masks by kind of layer: one of the tokens, else one over the whole context, else any."""
    given = {kind: mask for kind, mask in masks.items() if mask is not None}
    plain = [mask for mask in given.values() if isinstance(mask, Tensor) and mask.ndim == 2]
    return next(
        iter([*plain, *([given["full_attention"]] if "full_attention" in given else []), *given.values()]), None
    )


def _columns(mask: Tensor, S: int, cache: Any) -> Tensor:
    """int64 (S,): the columns of the new tokens: after what the cache holds, or the last ones of a sliding window."""
    W = mask.shape[-1]
    past = cache.get_seq_length() if W > S and hasattr(cache, "get_seq_length") else W - S
    if not isinstance(past, Tensor):  # a static cache keeps it on the device: it is not waited for
        past = min(int(past), W - S)
    return torch.arange(S, device=mask.device) + past
