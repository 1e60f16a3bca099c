"""A circuit breaker for many groups at once (layers, experts, ranks): closed, open, half-open, by slow calls.

Pure arithmetic on arrays; it measures no time and changes no model. The semantics are resilience4j's: a sliding window
of calls, a minimum of calls before there is an opinion, a wait while open, a few probes while half-open.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

State = Literal["closed", "open", "half_open"]
Granularity = Literal["expert", "layer", "rank"]
STATES: tuple[State, ...] = ("closed", "open", "half_open")
CLOSED, OPEN, HALF_OPEN = range(3)
SIZE_BUCKETS = 24  # powers of two of a call's size
LEARN, KEEP = 8, 0.98  # first calls of a bucket set its baseline by their median, later ones move it slowly
STATE_VERSION = 1


@dataclass(frozen=True)
class BreakerConfig:
    """When a group is too slow, and what happens then.

    A call is slow when it takes more than slow_s seconds (a widely read checklist says 500 ms), or more than slow_ratio
    times the baseline and more than floor_s. The baseline is that of calls of its size; where there is none, that of
    the next larger size that has one. A group opens when at least slow_share of its last `window` calls were slow, of
    at least min_calls. It stays open for open_s seconds, then lets probe_share of the traffic through; probe_calls
    calls later it closes, or opens again.
    """

    slow_s: float = 0.5
    slow_ratio: float = 3.0
    floor_s: float = 1e-3
    slow_share: float = 0.5
    window: int = 100
    min_calls: int = 20
    open_s: float = 30.0
    probe_share: float = 0.05
    probe_calls: int = 10

    def __post_init__(self) -> None:
        for name in ("slow_s", "open_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"BreakerConfig.{name}: expected seconds, more than 0, got {getattr(self, name)}")
        if not self.slow_ratio > 1:
            raise ValueError(f"BreakerConfig.slow_ratio: expected more than 1, got {self.slow_ratio}")
        if not self.floor_s >= 0:
            raise ValueError(f"BreakerConfig.floor_s: expected 0 or more seconds, got {self.floor_s}")
        for name in ("slow_share", "probe_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"BreakerConfig.{name}: expected a share in (0, 1], got {getattr(self, name)}")
        for name in ("window", "min_calls", "probe_calls"):
            if getattr(self, name) < 1:
                raise ValueError(f"BreakerConfig.{name}: expected at least 1 call, got {getattr(self, name)}")
        if self.min_calls > self.window:
            raise ValueError(
                f"BreakerConfig.min_calls: expected at most window = {self.window}, got {self.min_calls}; it would "
                "never have an opinion"
            )


@dataclass(frozen=True)
class Transition:
    """One group's change of state. slow_share: of its calls in the window, or of its probes. p50_s, p99_s: in seconds.

    limit_s: what was too slow for the last of them, which had that size; NaN without calls. at: by the breaker's clock.
    """

    name: str
    before: State
    after: State
    slow_share: float
    num_calls: int
    limit_s: float
    p99_s: float
    at: float
    p50_s: float = math.nan


class Breaker:
    """G groups by name. granularity: what a group is, for whoever reads the numbers. clock: seconds."""

    def __init__(
        self,
        names: Sequence[str],
        config: BreakerConfig = BreakerConfig(),
        *,
        granularity: Granularity = "layer",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        G = len(names)
        if G < 1 or len(set(names)) < G:
            raise ValueError(f"Breaker.names: expected different names, at least one, got {list(names)[:5]}")
        self.names, self.config, self.granularity = tuple(names), config, granularity
        self._clock = clock
        self._state_G = np.zeros(G, dtype=np.int8)
        self._since_G = np.zeros(G)
        self._seconds_WG = np.full((config.window, G), np.nan)
        self._slow_WG = np.zeros((config.window, G), dtype=bool)
        self._calls_G = np.zeros(G, dtype=np.int64)  # in this state; the next one goes into row calls % window
        self._num_slow_G = np.zeros(G, dtype=np.int64)  # in the window
        self._limit_G = np.full(G, np.nan)  # of the last call, in seconds
        self._baseline_GS = np.full((G, SIZE_BUCKETS), np.nan)
        self._learned_GS = np.zeros((G, SIZE_BUCKETS), dtype=np.int64)
        self._first_GSL = np.full((G, SIZE_BUCKETS, LEARN), np.nan)

    # ------------------------------------------------------------------------------------------------- reading

    @property
    def states(self) -> dict[str, State]:
        """By name."""
        return {name: STATES[state] for name, state in zip(self.names, self._state_G, strict=True)}

    @property
    def dense_share_G(self) -> np.ndarray:
        """float64 (G,), the share of the traffic to keep away: 0 closed, 1 open, 1 - probe_share half-open."""
        return np.array([0.0, 1.0, 1.0 - self.config.probe_share])[self._state_G]

    @property
    def p99_s(self) -> np.ndarray:
        """float64 (G,), the 99th percentile of the calls in the window, in seconds; NaN without calls."""
        return _p99(self._seconds_WG, np.minimum(self._calls_G, self.config.window))

    @property
    def p50_s(self) -> np.ndarray:
        """float64 (G,), their median, in seconds; NaN without calls."""
        return _quantile(self._seconds_WG, np.minimum(self._calls_G, self.config.window), 0.5)

    @property
    def has_opinion(self) -> np.ndarray:
        """bool (G,), whether there are enough calls in the window to judge by."""
        return np.asarray(self._calls_G >= self.config.min_calls)

    @property
    def slow_share_G(self) -> np.ndarray:
        """float64 (G,), the share of slow calls in the window; 0 without calls."""
        return self._num_slow_G / np.maximum(np.minimum(self._calls_G, self.config.window), 1)

    def baseline_s(self, name: str, size: float) -> float:
        """What a call of that size usually takes, in seconds; NaN while that is not known."""
        if name not in self.names:
            raise ValueError(f"baseline_s: expected one of {', '.join(self.names[:5])}, ..., got {name!r}")
        return float(self._baseline_GS[self.names.index(name), int(_bucket(np.array([size]))[0])])

    # ------------------------------------------------------------------------------------------------- moving

    def record(self, seconds_G: np.ndarray, sizes_G: np.ndarray) -> list[Transition]:
        """One call per group: how long it took, NaN for none, and its size (tokens or rows). What changed by it."""
        seconds_G = np.asarray(seconds_G, dtype=np.float64)
        sizes_G = np.asarray(sizes_G, dtype=np.float64)
        for what, given in (("seconds_G", seconds_G), ("sizes_G", sizes_G)):
            if given.shape != self._state_G.shape:
                raise ValueError(f"record: {what}: expected {len(self.names)} numbers, got shape {given.shape}")
        moved = self.tick()
        called = np.flatnonzero(~np.isnan(seconds_G) & (self._state_G != OPEN))
        if not len(called):
            return moved
        bucket = _bucket(sizes_G[called])
        seconds, limit = seconds_G[called], self._limits(called, bucket)
        slow = seconds > limit
        self._limit_G[called] = limit
        row = self._calls_G[called] % self.config.window
        self._num_slow_G[called] += slow.astype(np.int64) - self._slow_WG[row, called]
        self._slow_WG[row, called], self._seconds_WG[row, called] = slow, seconds
        self._calls_G[called] += 1
        self._learn(called, seconds, bucket, slow)
        return moved + self._judge(called)

    def tick(self) -> list[Transition]:
        """Open groups whose wait is over become half-open. `record` does it too."""
        if not (self._state_G == OPEN).any():  # nearly always: nobody waits
            return []
        now = self._clock()
        waited_G = now - self._since_G
        self._since_G = np.where(waited_G < 0, now, self._since_G)  # the clock has jumped back: the wait begins anew
        due = np.flatnonzero((self._state_G == OPEN) & (waited_G >= self.config.open_s))
        return [self._move(int(group), HALF_OPEN, now) for group in due]

    def _limits(self, groups: np.ndarray, bucket: np.ndarray) -> np.ndarray:
        """Seconds above which a call of that size is slow."""
        baseline = self._baseline_GS[groups, bucket]
        new = np.flatnonzero(np.isnan(baseline))
        if len(new):  # probes are smaller than what was seen before: a larger size that is known is their limit
            larger = ~np.isnan(self._baseline_GS[groups[new]]) & (np.arange(SIZE_BUCKETS) >= bucket[new, None])
            baseline[new] = self._baseline_GS[groups[new], larger.argmax(1)]
            baseline[new[~larger.any(1)]] = np.nan
        relative = np.maximum(self.config.slow_ratio * baseline, self.config.floor_s)  # NaN stays
        limits: np.ndarray = np.fmin(relative, self.config.slow_s)  # NaN gives way
        return limits

    def _learn(self, groups: np.ndarray, seconds: np.ndarray, bucket: np.ndarray, slow: np.ndarray) -> None:
        """Move the baselines of closed groups by calls that were not slow: slowness must not become usual."""
        healthy = (self._state_G[groups] == CLOSED) & ~slow
        groups, seconds, bucket = groups[healthy], seconds[healthy], bucket[healthy]
        learned = self._learned_GS[groups, bucket]
        new = learned < LEARN
        self._first_GSL[groups[new], bucket[new], learned[new]] = seconds[new]
        self._learned_GS[groups, bucket] += 1
        known = self._learned_GS[groups, bucket] == LEARN
        first = self._first_GSL[groups[known], bucket[known]]
        if len(first):  # a median of nothing takes its time too
            self._baseline_GS[groups[known], bucket[known]] = np.median(first, axis=-1)
        old = learned >= LEARN
        before = self._baseline_GS[groups[old], bucket[old]]
        self._baseline_GS[groups[old], bucket[old]] = KEEP * before + (1 - KEEP) * seconds[old]

    def _judge(self, groups: np.ndarray) -> list[Transition]:
        now, config = self._clock(), self.config
        share, calls, state = self.slow_share_G[groups], self._calls_G[groups], self._state_G[groups]
        trips = (state == CLOSED) & (calls >= config.min_calls) & (share >= config.slow_share)
        probed = (state == HALF_OPEN) & (calls >= config.probe_calls)
        fails = trips | (probed & (share >= config.slow_share))
        heals = probed & (share < config.slow_share)
        moves = [(int(g), OPEN) for g in groups[fails]] + [(int(g), CLOSED) for g in groups[heals]]
        return [self._move(group, state, now) for group, state in moves]

    def _move(self, group: int, state: int, now: float) -> Transition:
        """Change the state of one group and forget its calls."""
        calls = int(min(self._calls_G[group], self.config.window))
        seconds_W1 = self._seconds_WG[:, [group]]  # of this group alone: there may be many
        told = Transition(
            self.names[group],
            STATES[self._state_G[group]],
            STATES[state],
            float(self._num_slow_G[group]) / max(calls, 1),
            calls,
            float(self._limit_G[group]),
            float(_p99(seconds_W1, np.array([calls]))[0]),
            now,
            float(_quantile(seconds_W1, np.array([calls]), 0.5)[0]),
        )
        self._state_G[group], self._since_G[group] = state, now
        self._forget(np.array([group]))
        return told

    def _forget(self, groups: np.ndarray) -> None:
        """Their calls, not their baselines."""
        self._calls_G[groups] = self._num_slow_G[groups] = 0
        self._limit_G[groups] = np.nan
        self._seconds_WG[:, groups], self._slow_WG[:, groups] = np.nan, False

    # ------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """States and baselines, JSON-able; the calls of the window are not kept. Waits begin anew in a new process."""
        groups, buckets = (~np.isnan(self._baseline_GS)).nonzero()
        known = zip(groups.tolist(), buckets.tolist(), self._baseline_GS[groups, buckets].tolist(), strict=True)
        return {
            "version": STATE_VERSION,
            "names": list(self.names),
            "states": [STATES[state] for state in self._state_G],
            "baselines": [list(each) for each in known],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned. Raises ValueError for that of other groups, and changes nothing."""
        if state.get("version") != STATE_VERSION or state.get("names") != list(self.names):
            raise ValueError(
                f"breaker state: expected version {STATE_VERSION} of {len(self.names)} groups of these names, got "
                f"version {state.get('version')!r}; start with a new breaker, what is still slow will open again"
            )
        codes = {name: code for code, name in enumerate(STATES)}
        try:
            pairs = zip(self.names, state["states"], strict=True)
            states = np.array([codes[each] for _, each in pairs], dtype=np.int8)
            baselines = np.full(self._baseline_GS.shape, np.nan)
            for group, bucket, seconds in state["baselines"]:
                baselines[group, bucket] = seconds
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"breaker state: expected what state_dict() returned, got damaged entries ({error}); start with a new "
                "breaker"
            ) from error
        self._state_G[:], self._since_G[:] = states, self._clock()
        self._forget(np.arange(len(states)))  # they led to another state
        self._baseline_GS, self._learned_GS = baselines, np.where(np.isnan(baselines), 0, LEARN)


def _p99(seconds_WG: np.ndarray, count_G: np.ndarray) -> np.ndarray:
    return _quantile(seconds_WG, count_G, 0.99)


def _quantile(seconds_WG: np.ndarray, count_G: np.ndarray, share: float) -> np.ndarray:
    """float64 (G,), the smallest of the calls that this share does not exceed; NaN without calls."""
    sorted_WG = np.sort(seconds_WG, axis=0)  # NaN goes last
    place_G = np.maximum(np.ceil(share * count_G).astype(int) - 1, 0)
    quantile_G: np.ndarray = np.where(count_G > 0, sorted_WG[place_G, np.arange(len(place_G))], np.nan)
    return quantile_G


def _bucket(sizes: np.ndarray) -> np.ndarray:
    """int64, the power of two at or below each size, at most SIZE_BUCKETS - 1; 0 for sizes below 2."""
    powers = np.minimum(np.log2(np.maximum(sizes, 1)), SIZE_BUCKETS - 1)
    bucket: np.ndarray = powers.astype(np.int64)
    return bucket
