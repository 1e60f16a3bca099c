"""The experts that are in memory, within a number of bytes: which are there, which have to go, who holds one.

It knows keys, sizes and a function that reads; nothing of tensors, files or models. Any number of threads may use it.
A thread holds one expert at a time: whoever waits for room while holding some can wait for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, fields
from typing import Generic, Literal, TypeAlias, TypeVar

Key: TypeAlias = tuple[int, int]  # (layer, expert)
Policy = Literal["lru", "lfu"]
T = TypeVar("T")


@dataclass(frozen=True)
class CacheCounts:
    """Since the start, but for bytes_held.

    hits: asked for and there. misses: read by whoever asked. late: somebody else was reading it already. evicted: had
    to make room. prefetched: read before anybody asked; of these, used: asked for later, wasted: evicted before that.
    failed: reads ahead that failed. bytes_read: from the file. bytes_held, most_bytes: in memory now, and at most.
    """

    hits: int = 0
    misses: int = 0
    late: int = 0
    evicted: int = 0
    prefetched: int = 0
    used: int = 0
    wasted: int = 0
    failed: int = 0
    bytes_read: int = 0
    bytes_held: int = 0
    most_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Of all that were asked for; NaN before the first."""
        asked = self.hits + self.misses + self.late
        return self.hits / asked if asked else float("nan")

    @property
    def prefetch_precision(self) -> float:
        """Of what was read ahead and has been used or evicted since, the share that was used; NaN before the first."""
        settled = self.used + self.wasted
        return self.used / settled if settled else float("nan")


def check_memory(memory: int, least: int) -> None:
    """Raise ValueError for less than what one expert takes. Both in bytes."""
    if memory < least:
        raise ValueError(
            f"expert memory: expected room for at least one expert, {least:,} bytes, got {memory:,}; give it more"
        )


@dataclass(eq=False)
class _Entry(Generic[T]):
    size: int
    pins: int
    last_used: int
    ahead: bool  # read before anybody asked, and not asked for yet
    value: list[T] = field(default_factory=list)  # empty while it is being read


class ExpertCache(Generic[T]):
    """What `read` gives for a key, kept as long as there is room.

    size_of: bytes of a key. budget: bytes that everything held and everything being read may have together.
    policy: who has to go: "lru", who was not used for the longest time; "lfu", who was used least often since the
    start, and of these the longest unused. Whoever is held stays.
    recycle: gets what has to go, which nobody uses any more; it must not wait, nor use the cache.
    Raises ValueError for a budget without room for the largest of `keys`.
    """

    def __init__(
        self,
        read: Callable[[Key], T],
        size_of: Callable[[Key], int],
        keys: Iterable[Key],
        budget: int,
        policy: Policy = "lru",
        recycle: Callable[[T], None] = lambda value: None,
    ) -> None:
        if policy not in ("lru", "lfu"):
            raise ValueError(f"policy: expected lru or lfu, got {policy!r}")
        check_memory(budget, max((size_of(key) for key in keys), default=0))
        self._read, self._size_of, self.budget, self.policy = read, size_of, budget, policy
        self._recycle = recycle
        self._entries: dict[Key, _Entry[T]] = {}
        self._uses: dict[Key, int] = {}
        self._tick = 0
        self._counts = dict.fromkeys((each.name for each in fields(CacheCounts)), 0)
        self._changed = threading.Condition()

    def take(self, key: Key) -> T:
        """Hold an expert, in memory, until `give_back`; waits for room. What `read` raises is raised here."""
        with self._changed:
            self._uses[key] = self._uses.get(key, 0) + 1
            entry = self._there(key)
            if entry is not None:
                return entry.value[0]
            entry = self._reserve(key, pins=1, ahead=False)
            self._count(misses=1)
        return self._fill(key, entry)

    def give_back(self, key: Key) -> None:
        """No longer held by this caller."""
        with self._changed:
            entry = self._entries[key]
            entry.pins -= 1
            if entry.pins == 0:
                self._changed.notify_all()

    def prefetch(self, key: Key, keep: Collection[Key] = ()) -> bool:
        """Read an expert that may be asked for soon. Whether it was read.

        It is not where it is there already, nor where only those in `keep`, or held, could make room.
        """
        with self._changed:
            if key in self._entries or not self._make_room(self._size_of(key), keep):
                return False
            entry = self._reserve(key, pins=0, ahead=True)
        try:
            self._fill(key, entry)
        except Exception:
            with self._changed:
                self._count(failed=1)
            return False
        return True

    def in_memory_first(self, keys: Iterable[Key]) -> list[Key]:
        """The same keys: those that are in memory, then the others, which might make them go."""
        with self._changed:
            return sorted(keys, key=lambda key: key not in self._entries)

    def held(self) -> frozenset[Key]:
        """What is in memory."""
        with self._changed:
            return frozenset(key for key, entry in self._entries.items() if entry.value)

    def counts(self) -> CacheCounts:
        """So far."""
        with self._changed:
            return CacheCounts(**self._counts)

    # ------------------------------------------------------------------------------------- all below under the lock

    def _there(self, key: Key) -> _Entry[T] | None:
        """The entry, pinned, once it is read, or None when this caller has to read it and there is room."""
        waited = False
        while True:
            entry = self._entries.get(key)
            if entry is None:
                if self._make_room(self._size_of(key), ()):
                    return None
            elif entry.value:
                self._count(late=waited, hits=not waited, used=entry.ahead)
                entry.pins, entry.ahead = entry.pins + 1, False
                entry.last_used = self._next_tick()
                return entry
            else:
                waited = True  # somebody is reading it
            self._changed.wait()

    def _make_room(self, size: int, keep: Collection[Key]) -> bool:
        """Evict as many as needed, if that is enough; else nobody goes."""
        missing = self._counts["bytes_held"] + size - self.budget
        if missing <= 0:
            return True
        free = [key for key, each in self._entries.items() if each.value and not each.pins and key not in keep]
        if sum(self._entries[key].size for key in free) < missing:
            return False
        for key in sorted(free, key=self._worth):
            entry = self._entries.pop(key)
            self._recycle(entry.value[0])
            self._count(evicted=1, wasted=entry.ahead, bytes_held=-entry.size)
            missing -= entry.size
            if missing <= 0:
                return True
        return False

    def _worth(self, key: Key) -> tuple[int, int]:
        uses = self._uses.get(key, 0) if self.policy == "lfu" else 0
        return uses, self._entries[key].last_used

    def _reserve(self, key: Key, pins: int, ahead: bool) -> _Entry[T]:
        entry = _Entry[T](self._size_of(key), pins, self._next_tick(), ahead)
        self._entries[key] = entry
        self._count(bytes_held=entry.size)
        self._counts["most_bytes"] = max(self._counts["most_bytes"], self._counts["bytes_held"])
        return entry

    def _next_tick(self) -> int:
        self._tick += 1
        return self._tick

    def _count(self, **more: int) -> None:
        for name, number in more.items():
            self._counts[name] += number

    # --------------------------------------------------------------------------------------------- without the lock

    def _fill(self, key: Key, entry: _Entry[T]) -> T:
        """Read what was reserved; a failure leaves no trace but the exception."""
        try:
            value = self._read(key)
        except BaseException:
            with self._changed:
                del self._entries[key]
                self._count(bytes_held=-entry.size)
                self._changed.notify_all()
            raise
        with self._changed:
            entry.value.append(value)
            self._count(bytes_read=entry.size, prefetched=entry.ahead)
            self._changed.notify_all()
        return value
