"""Active FLOPs of a model, counted as it runs and not derived, and one width that is fitted to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from equipoise.models.config import DecoderConfig
from equipoise.models.decoder import Decoder

_STEP = 8  # widths are multiples of it
_TOKENS = (4, 64)  # sequences and their length: shares of experts even out over some hundred tokens


def flops_per_token(config: DecoderConfig, seq_len: int = _TOKENS[1]) -> float:
    """Multiplications and additions of a forward, per token, as torch counts them for random tokens.

    The experts' operator is counted by the rows that it is given: torch can't look into operators of ours.
    """
    lean = config if config.moe is None else replace(config, moe=replace(config.moe, backend="lean"))
    torch.manual_seed(0)
    model = Decoder(lean).eval()
    tokens_BS = torch.randint(config.vocab_size, (_TOKENS[0], seq_len))
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.equipoise.lean_forward: _of_experts})
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # the fused attention of a CPU isn't counted
        model(tokens_BS)
    return counter.get_total_flops() / tokens_BS.numel()


def _of_experts(
    x_TD: Tensor, weights_R: Tensor, up_eHD: Tensor, down_eDF: Tensor, token_ids_R: Tensor, *_: object, **__: object
) -> int:
    return 2 * len(token_ids_R) * (up_eHD[0].numel() + down_eDF[0].numel())


_of_experts._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes


def fitted(build: Callable[[int], DecoderConfig], flops: float, width: int) -> DecoderConfig:
    """The configuration whose width comes closest to so many FLOPs per token, which must be linear in the width.

    build: of a width; width: any, to begin with. Raises ValueError where no positive width does.
    """
    low, high = flops_per_token(build(width)), flops_per_token(build(2 * width))
    per_unit = (high - low) / width
    exact = width + (flops - low) / per_unit
    found = max(_STEP, round(exact / _STEP) * _STEP)
    if exact < _STEP / 2:
        raise ValueError(
            f"width: expected one that makes {flops:.0f} FLOPs per token, but everything else takes "
            f"{low - width * per_unit:.0f} already; make the rest smaller"
        )
    return build(found)
