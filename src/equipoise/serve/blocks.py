"""Which blocks of the key/value cache are free, used, or hold a prefix that others can use again. No tensors.

A block that is given back keeps its content until it is needed, the least recently used first. A prefix is found by its
tokens themselves, block by block, not by a hash: two prefixes cannot be mistaken for each other.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

ROOT = 0  # the prefix of no tokens
Key = tuple[int, bytes]  # (prefix, tokens after it)


class BlockPool:
    """Blocks of `block_size` tokens each, by number from 0. reuse: whether prefixes are shared."""

    def __init__(self, num_blocks: int, block_size: int, *, reuse: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"BlockPool: expected at least one block of at least one token, got {num_blocks} of {block_size}; "
                "give the cache more memory"
            )
        self.num_blocks, self.block_size, self._reuse = num_blocks, block_size, reuse
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next to be taken first
        self._block_of: dict[Key, tuple[int, int]] = {}  # -> (prefix, block)
        self._key_of: dict[int, Key] = {}
        self._next_prefix = ROOT + 1

    @property
    def num_free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that somebody uses."""
        return sum(references > 0 for references in self._references)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """(blocks whose content is the beginning of `tokens`, the prefix they make). Not taken yet: see `take`."""
        blocks, prefix = [], ROOT
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            found = self._block_of.get((prefix, _packed(tokens[start : start + self.block_size])))
            if found is None:
                break
            prefix, block = found
            blocks.append(block)
        return blocks, prefix

    def num_to_spare(self, blocks: Sequence[int]) -> int:
        """Free blocks that are left when these are taken."""
        return len(self._free) - sum(1 for block in blocks if not self._references[block])

    def take(self, blocks: Sequence[int]) -> None:
        """Use blocks that `match` found, together with whoever else does."""
        for block in blocks:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1

    def allocate(self, number: int) -> list[int]:
        """So many blocks of one's own. Raises ValueError when there are not so many."""
        if number > len(self._free):
            raise ValueError(f"BlockPool: expected {number} free blocks, there are {len(self._free)}")
        taken = [self._free.popitem(last=False)[0] for _ in range(number)]
        for block in taken:
            self._forget(block)
            self._references[block] = 1
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Give back; the last ones are taken first, as beginnings are more likely to be used again."""
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise ValueError(f"BlockPool: block {block} is given back, and nobody uses it")
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)  # nothing in it can be used again

    def publish(self, prefix: int, tokens: Sequence[int], block: int) -> int:
        """Say that a full block holds `tokens` after `prefix`; the prefix that they make together."""
        if not self._reuse:
            return ROOT
        key = (prefix, _packed(tokens))
        known = self._block_of.get(key)
        if known is not None:  # somebody else was faster: theirs is found from now on, this one is used up
            return known[0]
        made, self._next_prefix = self._next_prefix, self._next_prefix + 1
        self._block_of[key] = (made, block)
        self._key_of[block] = key
        return made

    def forget_all(self) -> None:
        """No content can be used again: the weights that made it have changed."""
        self._block_of.clear()
        self._key_of.clear()

    def forget(self, blocks: Sequence[int]) -> None:
        """What is in these must not be used again."""
        for block in blocks:
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]


def _packed(tokens: Sequence[int]) -> bytes:
    """In 4 bytes each, in one piece: a pool keeps these for long, and objects of which each token is one are many small
    ones among the short-lived ones of requests, which keep the allocator from giving memory back."""
    return array("i", tokens).tobytes()
