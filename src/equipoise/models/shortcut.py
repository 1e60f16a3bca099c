"""Shortcut-connected MoE: routed experts read an earlier stream than the shared experts, and have longer to get there.

ScMoE (arXiv 2404.05019); formulas and places in docs/scmoe.md. What is read, and so the result, is fixed by
`MoEConfig.shortcut`; `shortcut_slot` only moves the experts' computation between the sub-blocks. Nothing here knows
communication: a dispatcher that spans ranks sends rows in `begin` and in `compute`, and waits one statement later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from equipoise.layer import MoE
from equipoise.layer.moe import Begun, Computed
from equipoise.models.block import BatchView, Block
from equipoise.models.config import SHORTCUT_WINDOW, DecoderConfig
from equipoise.types import BatchScope

Part = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Shortcut:
    """The blocks that one shortcut spans: that of the MoE, last, and for pos2 and pos3 the dense block before it.

    Their sub-blocks are numbered from 0: attention and MLP of the dense block, attention and shared experts of the
    other. begin: the sub-block whose input, a normed stream, is also the routed experts'. compute: the one before
    which the experts are computed, begin or later.
    """

    blocks: tuple[Block, ...]
    begin: int
    compute: int
    has_moe: ClassVar[bool] = True

    def __call__(self, x_BSD: Tensor, view: BatchView, scope: BatchScope | None) -> Tensor:
        """What the blocks make of x: every sub-block adds to the stream, and the routed experts at the end."""
        moe = self._moe
        begun: Begun | None = None
        computed: Computed | None = None
        norms, parts = self._sub_blocks(view)
        for number, norm in enumerate(norms):
            normed_BSD = norm(x_BSD)
            if number == self.begin:
                begun = moe.begin(normed_BSD, token_ids=view.tokens_BS, padding_mask=view.padding_BS)
            if number == self.compute and begun is not None:
                computed = moe.compute(begun)
            if number < len(parts):
                x_BSD = x_BSD + parts[number](normed_BSD)
        assert computed is not None
        return x_BSD + moe.finish(computed, scope=scope, shared_x=normed_BSD)

    @property
    def _moe(self) -> MoE:
        moe = self.blocks[-1].mlp
        assert isinstance(moe, MoE)
        return moe

    def _sub_blocks(self, view: BatchView) -> tuple[list[Part], list[Part]]:
        """(norms, what they feed). The last norm feeds the shared experts, which are in `MoE.finish`."""
        norms: list[Part] = []
        parts: list[Part] = []
        for block in self.blocks:
            norms += [block.input_layernorm, block.post_attention_layernorm]
            parts += [partial(block.mix, view=view), block.mlp]
        return norms, parts[:-1]


def units(blocks: Iterable[Block], config: DecoderConfig) -> list[Block | Shortcut]:
    """The model's blocks in order, those that one shortcut spans put together."""
    moe = config.moe
    found: list[Block | Shortcut] = []
    for block in blocks:
        if moe is None or moe.shortcut is None or not block.has_moe:
            found.append(block)
            continue
        spanned: tuple[Block, ...] = (block,)
        if moe.shortcut != "pos1":
            before = found.pop()
            assert isinstance(before, Block), "the configuration has a dense block before each MoE block"
            spanned = (before, block)
        begin = 2 * len(spanned) - SHORTCUT_WINDOW[moe.shortcut]
        found.append(Shortcut(spanned, begin, begin + moe.expert_slot))
    return found
