"""Experts within a number of bytes: who goes is exact, who is held stays, and threads neither lose nor exceed."""

import random
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.small.cache import ExpertCache

KEYS = [(0, expert) for expert in range(6)]
ANY = st.sampled_from(KEYS)


def sized(key):
    """10, 20 and 30 bytes."""
    return 10 * (1 + key[1] % 3)


def cache_of(budget, policy="lru", *, read=lambda key: f"expert {key}", size_of=lambda key: 10):
    return ExpertCache(read, size_of, KEYS, budget, policy)


def use(cache, *experts):
    for expert in experts:
        assert cache.take((0, expert)) == f"expert {(0, expert)}"
        cache.give_back((0, expert))


def held(cache):
    return sorted(expert for _, expert in cache.held())


def test_lru_by_hand():
    cache = cache_of(30)
    use(cache, 0, 1, 2)
    use(cache, 0)  # 1 is the longest unused now
    use(cache, 3)
    assert held(cache) == [0, 2, 3]
    use(cache, 2, 4)  # 0 is
    assert held(cache) == [2, 3, 4]
    counts = cache.counts()
    assert (counts.hits, counts.misses, counts.evicted, counts.bytes_read) == (2, 5, 2, 50)
    assert (counts.bytes_held, counts.most_bytes) == (30, 30)
    assert counts.hit_rate == 2 / 7


def test_lfu_by_hand():
    cache = cache_of(30, "lfu")
    use(cache, 0, 0, 1, 1, 1, 2, 2)
    use(cache, 3)  # 0 and 2 were used twice, 0 earlier
    assert held(cache) == [1, 2, 3]
    use(cache, 4)  # 3 was used once
    assert held(cache) == [1, 2, 4]
    use(cache, 0)  # 4 goes; the uses of 0 from before count, so that next 2 is the least used
    use(cache, 5)
    assert held(cache) == [0, 1, 5]


class Naive:
    """The slow twin: a list of (key, when, uses), searched from its beginning."""

    def __init__(self, budget, policy):
        self.budget, self.policy, self.there, self.uses, self.now = budget, policy, {}, {}, 0

    def use(self, key):
        self.now += 1
        self.uses[key] = self.uses.get(key, 0) + 1
        if key not in self.there:
            while sum(map(sized, self.there)) + sized(key) > self.budget:
                by = {"lru": lambda k: self.there[k], "lfu": lambda k: (self.uses[k], self.there[k])}[self.policy]
                del self.there[min(self.there, key=by)]
        self.there[key] = self.now


@given(st.lists(ANY, max_size=60), st.integers(30, 120), st.sampled_from(["lru", "lfu"]))
def test_who_goes_is_exact(keys, budget, policy):
    cache, naive = ExpertCache(str, sized, KEYS, budget, policy), Naive(budget, policy)
    for key in keys:
        cache.take(key)
        cache.give_back(key)
        naive.use(key)
        assert cache.held() == set(naive.there)
        assert cache.counts().bytes_held == sum(map(sized, naive.there)) <= budget


def test_who_is_held_stays():
    cache = cache_of(20)
    cache.take((0, 0))
    cache.take((0, 0))
    use(cache, 1, 2, 3)
    assert held(cache) == [0, 3]
    cache.give_back((0, 0))  # the other holder has not
    use(cache, 4)
    assert held(cache) == [0, 4]
    cache.give_back((0, 0))
    use(cache, 5)
    assert held(cache) == [4, 5]


def test_too_little_for_one_is_refused_with_what_is_needed():
    with pytest.raises(ValueError, match=r"expected room for at least one expert, 30 bytes, got 29; give it more"):
        ExpertCache(str, sized, KEYS, 29)
    with pytest.raises(ValueError, match="policy: expected lru or lfu, got 'fifo'"):
        cache_of(30, "fifo")


def test_room_for_one_is_enough():
    cache = cache_of(10)
    use(cache, *(random.Random(0).choices(range(6), k=50)))
    assert cache.counts().most_bytes == 10


class TestReadingAhead:
    def test_it_is_counted_as_used_or_wasted(self):
        cache = cache_of(30)
        assert cache.prefetch((0, 0))
        assert cache.prefetch((0, 1))
        assert not cache.prefetch((0, 1))  # it is there
        use(cache, 0, 0)
        use(cache, 2, 3)  # 1 goes, unused
        counts = cache.counts()
        assert (counts.prefetched, counts.used, counts.wasted) == (2, 1, 1)
        assert counts.prefetch_precision == 0.5
        assert (counts.hits, counts.misses) == (2, 2)

    def test_it_makes_nobody_go_who_is_wanted(self):
        cache = cache_of(20)
        use(cache, 0)
        cache.take((0, 1))
        assert not cache.prefetch((0, 2), keep={(0, 0)})
        assert held(cache) == [0, 1]
        assert cache.prefetch((0, 2), keep={(0, 5)})
        assert held(cache) == [1, 2]

    def test_a_failure_is_counted_and_leaves_nothing(self):
        def fails(key):
            raise OSError("gone")

        cache = cache_of(20, read=fails)
        assert not cache.prefetch((0, 1))
        counts = cache.counts()
        assert (counts.failed, counts.bytes_held, counts.prefetched) == (1, 0, 0)
        with pytest.raises(OSError, match="gone"):
            cache.take((0, 1))
        assert cache.counts().bytes_held == 0

    def test_nothing_measured_yet(self):
        counts = cache_of(20).counts()
        assert counts.hit_rate != counts.hit_rate
        assert counts.prefetch_precision != counts.prefetch_precision


def test_those_in_memory_come_first():
    cache = cache_of(30)
    use(cache, 3, 1)
    assert cache.in_memory_first([(0, 0), (0, 1), (0, 2), (0, 3)]) == [(0, 1), (0, 3), (0, 0), (0, 2)]


def until_somebody_waits(cache):
    end = time.monotonic() + 10
    while not cache._changed._waiters:  # of the standard library's Condition
        assert time.monotonic() < end
        time.sleep(0.001)


def in_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_whoever_comes_while_it_is_read_waits_for_that_read():
    begun, go_on, reads = threading.Event(), threading.Event(), []

    def slow(key):
        reads.append(key)
        begun.set()
        assert go_on.wait(10)
        return f"expert {key}"

    cache = cache_of(20, read=slow)
    ahead = in_thread(lambda: cache.prefetch((0, 1)))
    assert begun.wait(10)
    asked = in_thread(lambda: use(cache, 1))
    until_somebody_waits(cache)
    assert asked.is_alive()
    go_on.set()
    ahead.join(10)
    asked.join(10)
    assert reads == [(0, 1)]
    counts = cache.counts()
    assert (counts.late, counts.hits, counts.misses, counts.used) == (1, 0, 0, 1)


def test_whoever_finds_no_room_waits_until_one_is_given_back():
    cache = cache_of(10)
    cache.take((0, 0))
    other = in_thread(lambda: use(cache, 1))
    until_somebody_waits(cache)
    assert other.is_alive()
    assert held(cache) == [0]
    cache.give_back((0, 0))
    other.join(10)
    assert held(cache) == [1]


def test_when_a_read_fails_whoever_waits_reads_itself():
    begun, go_on, reads = threading.Event(), threading.Event(), []

    def first_fails(key):
        reads.append(key)
        if len(reads) == 1:
            begun.set()
            assert go_on.wait(10)
            raise OSError("once")
        return f"expert {key}"

    cache = cache_of(10, read=first_fails)
    ahead = in_thread(lambda: cache.prefetch((0, 0)))
    assert begun.wait(10)
    asked = in_thread(lambda: use(cache, 0))
    go_on.set()
    ahead.join(10)
    asked.join(10)
    assert held(cache) == [0]
    assert len(reads) == 2


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("budget", [30, 60])
def test_threads_neither_lose_nor_exceed(policy, budget):
    """Every take gives the right expert; bytes and counts add up in the end."""
    reads, problems, takes = [], [], 300

    def read(key):
        reads.append(key)
        time.sleep(random.random() / 20_000)
        return key

    cache = ExpertCache(read, sized, KEYS, budget, policy)

    def taker(seed):
        rng = random.Random(seed)
        for _ in range(takes):
            key = rng.choice(KEYS)
            if cache.take(key) != key:
                problems.append(key)
            cache.give_back(key)

    def reader(seed):
        rng = random.Random(seed)
        for _ in range(takes):
            cache.prefetch(rng.choice(KEYS), keep=rng.sample(KEYS, 2))

    threads = [in_thread(lambda n=n: taker(n)) for n in range(3)] + [in_thread(lambda: reader(9))]
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert problems == []
    counts = cache.counts()
    assert counts.hits + counts.late + counts.misses == 3 * takes
    assert counts.misses + counts.prefetched == len(reads)
    assert counts.bytes_read == sum(map(sized, reads))
    assert counts.most_bytes <= budget
    assert counts.bytes_held == sum(map(sized, cache.held()))
    assert len(reads) - len(cache.held()) == counts.evicted
