"""Deliver a JSON message to one HTTP destination: tries again, slows down, and keeps what it could not deliver.

Exponential back-off with full jitter (tenacity's wait_random_exponential), Retry-After (RFC 9110, section 10.2.3), a
token bucket. It blocks while it tries: put the sink that uses it behind a `Background`. What a message says is not its
business.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.monitor.sinks.dead_letters import DeadLetters, Letter
from equipoise.monitor.sinks.destination import Destination
from equipoise.monitor.sinks.plain import rfc3339
from equipoise.monitor.sinks.post import Answer, Post
from equipoise.monitor.sinks.token_bucket import TokenBucket

if TYPE_CHECKING:
    from tenacity import RetryCallState

EXTRA = "pip install 'equipoise[alerts]'"
AGAIN = frozenset({408, 429, *range(500, 600)})  # answers that may be another one the next time


class DeliveryError(ValueError):
    """A message was not delivered. The text says why and where it is kept; no secret is in it."""


@dataclass(frozen=True)
class Effort:
    """How hard to try.

    timeout_s: per try, for connecting and for each wait for the answer. attempts: tries per message.
    first_wait_s, longest_wait_s: the pause after the n-th try is random in [0, min(longest, first 2^(n-1))], at least
    what the server asks for in Retry-After; if it asks for more than the longest wait, the message is given up for now.
    per_minute, burst: the rate limit, on tries. dead_letters: the file for what was not delivered; None loses it.
    Raises ValueError for numbers that make no sense.
    """

    timeout_s: float = 5.0
    attempts: int = 6
    first_wait_s: float = 1.0
    longest_wait_s: float = 120.0
    per_minute: float = 60.0
    burst: int = 10
    dead_letters: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("timeout_s", "attempts", "per_minute", "burst"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        if not 0 <= self.first_wait_s <= self.longest_wait_s:
            raise ValueError(
                f"first_wait_s: expected 0 to longest_wait_s = {self.longest_wait_s} seconds, got {self.first_wait_s}"
            )


@dataclass(frozen=True)
class Redelivered:
    """sent: letters that got through now. kept: still in the file. outdated: not sent, a later message got through."""

    sent: int
    kept: int
    outdated: int


@dataclass(frozen=True)
class _Outcome:
    """Of one try. failure: "" when delivered. again: another try may do. wait_s: what the server asks for."""

    failure: str = ""
    again: bool = False
    wait_s: float = 0.0


class Delivery:
    """Sends messages to one destination, one after the other.

    clock, sleep: for tests; seconds that only go forward, and a pause. `spill` cuts the default pause short.
    Raises ImportError where httpx or tenacity is missing.
    """

    def __init__(
        self,
        destination: Destination,
        effort: Effort = Effort(),
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        try:
            import tenacity

            self._post = Post(destination, effort.timeout_s)
        except ImportError as error:
            raise ImportError(f"alerts over HTTP need {error.name}, which is not installed; {EXTRA}") from error
        self._destination, self._effort = destination, effort
        self._bucket = TokenBucket(effort.per_minute / 60, effort.burst, clock)
        self._spilling = threading.Event()
        self._pause = self._spilling.wait if sleep is None else sleep
        self._letters = None if effort.dead_letters is None else DeadLetters(effort.dead_letters)
        self._late = set() if self._letters is None else self._letters.keys(destination.name)
        self._lock = threading.Lock()
        self._in_hand: Letter | None = None  # being tried; None once it is in the file
        backoff = tenacity.wait_random_exponential(multiplier=effort.first_wait_s, max=effort.longest_wait_s)
        self._retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(effort.attempts),
            wait=lambda state: max(backoff(state), _outcome(state).wait_s),
            retry=tenacity.retry_if_result(self._try_again),
            retry_error_callback=_outcome,
            sleep=self._sleep,
        )

    def send(self, body: Any, *, key: str = "", keep: bool = True) -> None:
        """Deliver one message, a JSON-able object or array without secrets.

        key: what it is about; a message that gets through makes older dead letters with its key out of date.
        keep: whether it goes to the dead letters when it can't be delivered. Raises DeliveryError then.
        """
        letter = Letter(self._destination.name, key, rfc3339(time.time(), "microseconds"), "", body)
        with self._lock:
            self._in_hand = letter if keep else None
        outcome = self._deliver(body)
        if not outcome.failure:
            with self._lock:
                self._in_hand = None
            self._note_success(letter)
            return
        where = self._bury(outcome.failure) if keep else "it was not to be kept"
        raise DeliveryError(f"{self._destination.name}: not delivered: {outcome.failure}; {where}")

    def redeliver(self, path: str | Path | None = None) -> Redelivered:
        """Send this destination's dead letters again, oldest first, and take out of the file those that get through.

        path: the file; as a default the one in `Effort`. Stops at the first that fails for a reason that may pass; one
        that the destination refuses stays in the file, and the others go on. A killed redelivery may send twice what
        it had sent. Raises ValueError without a file.
        """
        letters = self._letters if path is None else DeadLetters(path)
        if letters is None:
            raise ValueError("path: expected a dead-letter file, got None; name it here or in Effort.dead_letters")
        sent = 0
        with letters.taken(self._destination.name) as taken:
            for letter in taken.letters:
                outcome = self._deliver(letter.body)
                if not outcome.failure:
                    taken.back.remove(letter)
                    sent += 1
                elif outcome.again:
                    break
        return Redelivered(sent, len(taken.back), taken.outdated)

    def spill(self) -> None:
        """Wait for nothing any more: what is in hand, and what still comes, goes to the dead letters at once."""
        self._spilling.set()
        with self._lock:
            in_hand = self._in_hand is not None
        if in_hand:
            self._bury("the process is ending")

    def close(self) -> None:
        """Close the connections."""
        self._post.close()

    def _sleep(self, seconds: float) -> None:
        self._pause(seconds)

    def _deliver(self, body: Any) -> _Outcome:
        outcome: _Outcome = self._retrying.copy()(self._try, body)
        return outcome

    def _try(self, body: Any) -> _Outcome:
        wait_s = self._bucket.take()
        if wait_s and not self._spilling.is_set():
            self._sleep(wait_s)
        if self._spilling.is_set():
            return _Outcome("not tried, the process is ending", again=True)
        return self._judge(self._post(body))

    def _try_again(self, outcome: _Outcome) -> bool:
        return outcome.again and outcome.wait_s <= self._effort.longest_wait_s

    def _judge(self, answer: Answer) -> _Outcome:
        if answer.status is None:
            return _Outcome(answer.text, again=answer.again)
        if 200 <= answer.status < 300:
            return _Outcome()
        wait_s = retry_after(answer.retry_after, time.time())
        failure = f"HTTP {answer.status}{answer.text and f': {answer.text}'}"
        if wait_s > self._effort.longest_wait_s:
            failure += f" (asks to wait {wait_s:.0f} s, longer than longest_wait_s)"
        return _Outcome(failure, again=answer.status in AGAIN, wait_s=wait_s)

    def _note_success(self, letter: Letter) -> None:
        """Tell the file that letters with this key, up to this one, are out of date."""
        if letter.key and letter.key in self._late and self._letters is not None:
            self._letters.add(replace(letter, reason="delivered", body=None))
            self._late.discard(letter.key)

    def _bury(self, reason: str) -> str:
        """Put the message in hand into the file, once; returns where it is now."""
        if self._letters is None:
            return "it is lost: no Effort.dead_letters was given"
        with self._lock:
            letter, self._in_hand = self._in_hand, None
            if letter is not None:
                try:
                    self._letters.add(replace(letter, reason=reason))
                except OSError as error:
                    return f"it is lost: {self._letters.path}: {error}"
                self._late.add(letter.key)
        return f"it is kept in {self._letters.path}, `redeliver` sends it again"


def _outcome(state: RetryCallState) -> _Outcome:
    """What the last try gave; tenacity calls this when there is no try left."""
    assert state.outcome is not None
    outcome: _Outcome = state.outcome.result()
    return outcome


def retry_after(value: str, now: float) -> float:
    """Seconds from the header's text: a number, or an HTTP date relative to `now`; 0 for what is neither."""
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except ValueError:
        return 0.0
