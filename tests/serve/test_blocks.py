"""No block is used twice, none is lost, and a prefix is found exactly as long as its blocks hold it."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from equipoise.serve.blocks import ROOT, BlockPool


def fill(pool, tokens):
    """Blocks that hold the tokens, published; given back."""
    blocks = pool.allocate(pool.blocks_for(len(tokens)))
    prefix = ROOT
    for number, block in enumerate(blocks):
        part = tokens[number * pool.block_size : (number + 1) * pool.block_size]
        if len(part) == pool.block_size:
            prefix = pool.publish(prefix, part, block)
    pool.release(blocks)
    return blocks


def test_a_prefix_is_found_block_by_block():
    pool = BlockPool(8, 2)
    blocks = fill(pool, [1, 2, 3, 4, 5])
    assert pool.match([1, 2, 3, 4, 5, 6])[0] == blocks[:2]
    assert pool.match([1, 2, 3])[0] == blocks[:1]
    assert pool.match([1])[0] == []
    assert pool.match([3, 4])[0] == []  # the same tokens elsewhere are not the same
    assert pool.num_free == 8


def test_what_was_used_last_is_kept_longest():
    pool = BlockPool(4, 1)
    [a, b] = [fill(pool, [token])[0] for token in (1, 2)]
    pool.allocate(2)  # the empty ones
    assert pool.match([1])[0] == [a]
    pool.take([a])
    pool.release([a])
    assert pool.allocate(1) == [b]
    assert (pool.match([1])[0], pool.match([2])[0]) == ([a], [])


def test_what_holds_nothing_is_taken_before_what_does():
    pool = BlockPool(3, 1)
    [held] = fill(pool, [1])
    others = pool.allocate(2)
    pool.release(others[:1])
    assert pool.allocate(1) == others[:1]
    assert pool.match([1])[0] == [held]


def test_beginnings_are_kept_longer_than_ends():
    pool = BlockPool(3, 1)
    blocks = fill(pool, [1, 2, 3])
    pool.allocate(1)
    assert pool.match([1, 2, 3])[0] == blocks[:2]


def test_a_shared_block_is_free_when_the_last_one_gives_it_back():
    pool = BlockPool(2, 1)
    [block] = pool.allocate(1)
    pool.publish(ROOT, [1], block)
    pool.take([block])
    pool.release([block])
    assert (pool.num_free, pool.num_to_spare([block])) == (1, 1)
    pool.release([block])
    assert (pool.num_free, pool.num_to_spare([block])) == (2, 1)


def test_two_with_the_same_tokens_have_one_prefix():
    pool = BlockPool(4, 1)
    a, b = pool.allocate(2)
    prefix = pool.publish(ROOT, [1], a)
    assert pool.publish(ROOT, [1], b) == prefix
    assert pool.match([1]) == ([a], prefix)


def test_what_is_forgotten_is_not_found():
    pool = BlockPool(4, 1)
    blocks = fill(pool, [1, 2])
    pool.forget(blocks[1:])
    assert pool.match([1, 2])[0] == blocks[:1]
    pool.forget_all()
    assert pool.match([1, 2]) == ([], ROOT)
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]


def test_without_reuse_nothing_is_found():
    pool = BlockPool(2, 1, reuse=False)
    fill(pool, [1])
    assert pool.match([1]) == ([], ROOT)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="expected at least one block of at least one token, got 0 of 4; give"):
        BlockPool(0, 4)
    pool = BlockPool(2, 4)
    with pytest.raises(ValueError, match="expected 3 free blocks, there are 2"):
        pool.allocate(3)
    with pytest.raises(ValueError, match="block 1 is given back, and nobody uses it"):
        pool.release([1])


class PoolMachine(RuleBasedStateMachine):
    """Sequences of few tokens take, fill and give back blocks in any order; `written` is what each block holds."""

    SIZE, NUM = 2, 7

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(self.NUM, self.SIZE)
        self.open: list[tuple[list[int], list[int]]] = []  # (blocks, tokens)
        self.written: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def begin(self, tokens):
        blocks, prefix = self.pool.match(tokens)
        for number, block in enumerate(blocks):
            assert self.written[block] == tuple(tokens[: (number + 1) * self.SIZE]), "somebody else's tokens"
        missing = self.pool.blocks_for(len(tokens)) - len(blocks)
        if missing > self.pool.num_to_spare(blocks):
            return
        self.pool.take(blocks)
        made = self.pool.allocate(missing)
        for number, block in enumerate(made, start=len(blocks)):
            end = (number + 1) * self.SIZE
            self.written[block] = tuple(tokens[:end])
            if end <= len(tokens):
                prefix = self.pool.publish(prefix, tokens[end - self.SIZE : end], block)
        self.open.append((blocks + made, tokens))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data):
        blocks, _ = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.pool.release(blocks)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def forget(self, data):
        self.pool.forget(self.open[data.draw(st.integers(0, len(self.open) - 1))][0])

    @rule()
    def forget_all(self):
        self.pool.forget_all()

    @invariant()
    def references_and_sums_are_right(self):
        users = Counter(block for blocks, _ in self.open for block in blocks)
        assert [users[block] for block in range(self.NUM)] == self.pool._references
        assert self.pool.num_used == len(users)
        assert self.pool.num_free + self.pool.num_used == self.NUM
        assert not users.keys() & self.pool._free.keys()

    @invariant()
    def what_is_used_holds_its_own_tokens(self):
        for blocks, tokens in self.open:
            for number, block in enumerate(blocks):
                assert self.written[block] == tuple(tokens[: (number + 1) * self.SIZE])


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
