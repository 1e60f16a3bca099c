"""Who is computed in the next step, and how many tokens of each: queues, blocks and turns. No tensors.

Answers under way come first, one token each; what is left of the step's budget goes to prompts, in pieces. Those who
wait are admitted when there are blocks for their whole prompt, the client that has had the least first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from equipoise.serve.blocks import BlockPool
from equipoise.serve.experts_first import choose_by_experts
from equipoise.serve.sequence import Sequence


class Piece(NamedTuple):
    """Some tokens of a sequence: those from `start` on, `num_tokens` of them."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        """The first token after them."""
        return self.start + self.num_tokens

    @property
    def is_last(self) -> bool:
        """Whether the next token can be chosen after it."""
        return self.end == len(self.sequence.tokens)


@dataclass(frozen=True)
class Limits:
    """max_running: sequences at a time. tokens_per_step: computed in one forward, prompts and answers together.
    max_waiting: requests that wait; more are refused. decode_batch: answers that go on in one step; None is all of
    them. group_by_experts: with a decode_batch, prefer answers whose last tokens went to the same experts; who was left
    out max_skips steps in a row goes before all others.
    """

    max_running: int = 64
    tokens_per_step: int = 512
    max_waiting: int = 256
    decode_batch: int | None = None
    group_by_experts: bool = False
    max_skips: int = 4

    def __post_init__(self) -> None:
        for name in ("max_running", "tokens_per_step", "max_waiting", "max_skips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.decode_batch is not None and self.decode_batch < 1:
            raise ValueError(f"decode_batch: expected at least 1, or none for all, got {self.decode_batch}")
        if self.tokens_per_step <= self.max_running:
            raise ValueError(
                f"tokens_per_step: expected more than max_running = {self.max_running}, got {self.tokens_per_step}; "
                "answers under way would leave nothing for prompts"
            )
        if self.group_by_experts and self.decode_batch is None:
            raise ValueError("group_by_experts: needs decode_batch; where all answers go on at once there is no choice")


class Scheduler:
    """Decides. `schedule` takes blocks for what it names; whoever computes it then calls `computed`."""

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self.pool, self.limits = pool, limits
        self.running: list[Sequence] = []
        self._free_slots = list(range(limits.max_running))
        self._waiting: dict[str, deque[Sequence]] = {}  # by client
        self._served: dict[str, int] = {}  # tokens that those who wait or run have had
        self.num_preempted = 0

    @property
    def num_free_slots(self) -> int:
        """Sequences that could run beside those that do."""
        return len(self._free_slots)

    @property
    def num_waiting(self) -> int:
        """Requests in the queues. From any thread."""
        return sum(len(queue) for queue in list(self._waiting.values()))

    @property
    def waiting(self) -> Iterator[Sequence]:
        """All who wait."""
        return (sequence for queue in self._waiting.values() for sequence in queue)

    def add(self, sequence: Sequence) -> None:
        """To the end of its client's queue."""
        self._enter(sequence.request.client)
        self._waiting.setdefault(sequence.request.client, deque()).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It needs nothing more: blocks are given back."""
        if sequence.state == "running":
            self.running.remove(sequence)
        elif sequence.state == "waiting":
            self._waiting[sequence.request.client].remove(sequence)
        sequence.finish(self.pool)
        self._give_back_slot(sequence)
        self._leave(sequence.request.client)

    def retract(self, sequences: Iterable[Sequence]) -> None:
        """Back to the queues, where they were in the order of arrival; all is computed again."""
        for sequence in sequences:
            self.running.remove(sequence)
            sequence.retract(self.pool)
            self._give_back_slot(sequence)
            client = sequence.request.client
            self._waiting[client] = deque(_by_order([sequence, *self._waiting.get(client, ())]))

    def schedule(self) -> tuple[Piece, ...]:
        """What to compute now; empty when there is nothing to do."""
        budget = self.limits.tokens_per_step
        pieces: list[Piece] = []
        busy: set[Sequence] = set()

        def take(sequence: Sequence) -> None:
            nonlocal budget
            number = min(sequence.num_to_compute, budget)
            if self._make_room(sequence, sequence.num_computed + number, busy):
                pieces.append(Piece(sequence, sequence.num_computed, number))
                busy.add(sequence)
                budget -= number
                self._served[sequence.request.client] += number

        decoding = [sequence for sequence in self.running if sequence.decodes]
        prompts = [sequence for sequence in self.running if not sequence.decodes]
        for sequence in self._in_turn(decoding):
            if len(busy) == self.limits.decode_batch:
                break
            if sequence.state == "running":  # not preempted for one before it
                take(sequence)
        for sequence in _by_order(prompts):
            if sequence.state == "running" and budget:
                take(sequence)
        while budget and len(self.running) < self.limits.max_running and (admitted := self._admit()) is not None:
            take(admitted)
        for sequence in decoding:
            sequence.skipped = 0 if sequence in busy else sequence.skipped + 1
        return tuple(pieces)

    def computed(self, piece: Piece) -> None:
        """The piece's keys and values are there."""
        sequence = piece.sequence
        sequence.num_computed = piece.end
        sequence.publish(self.pool)

    def _in_turn(self, decoding: list[Sequence]) -> list[Sequence]:
        """Answers that are to go on in this step, then those that may where the first ones find no room."""
        chosen = self._chosen(decoding)
        others = set(decoding).difference(chosen)
        return [*_by_order(chosen), *_by_order(others)]

    def _chosen(self, decoding: list[Sequence]) -> list[Sequence]:
        """As many as decode_batch says."""
        size = self.limits.decode_batch
        if size is None or len(decoding) <= size:
            return decoding
        if self.limits.group_by_experts:
            return choose_by_experts(decoding, size, self.limits.max_skips)
        return sorted(decoding, key=lambda each: (-each.skipped, each.num_made))[:size]

    def _make_room(self, sequence: Sequence, num_tokens: int, busy: set[Sequence]) -> bool:
        """Blocks for so many tokens; others that came later go back to the queue for it, if they must.

        Whoever came first can always go on, so that everybody comes first one day.
        """
        missing = self.pool.blocks_for(num_tokens) - len(sequence.blocks)
        while missing > self.pool.num_free:
            victims = [each for each in self.running if each not in busy and each.order > sequence.order]
            if not victims:
                return False  # it waits for those who came before it
            self.num_preempted += 1
            self.retract([max(victims, key=lambda each: each.order)])
        if missing > 0:
            sequence.blocks += self.pool.allocate(missing)
        return True

    def _admit(self) -> Sequence | None:
        """The next of those who wait, with blocks for its tokens; None when there is nobody, or no room."""
        clients = [client for client, queue in self._waiting.items() if queue]
        if not clients:
            return None
        queue = self._waiting[min(clients, key=lambda client: self._served[client])]
        sequence = queue[0]
        reusable = [] if sequence.request.prompt_logprobs or sequence.request.routed_experts else sequence.tokens[:-1]
        blocks, prefix = self.pool.match(reusable)
        missing = self.pool.blocks_for(len(sequence.tokens)) - len(blocks)
        reserve = 1 if self.running else 0  # so that those who run can go on for a while
        if missing + reserve > self.pool.num_to_spare(blocks):
            return None
        queue.popleft()
        self.pool.take(blocks)
        sequence.blocks = blocks + self.pool.allocate(missing)
        sequence.prefix, sequence.num_published = prefix, len(blocks)
        sequence.num_computed = len(blocks) * self.pool.block_size
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        sequence.state, sequence.slot = "running", self._free_slots.pop()
        self.running.append(sequence)
        return sequence

    def _give_back_slot(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._free_slots.append(sequence.slot)
            sequence.slot = None

    # Turns: each client's tokens are counted, and who has had the least goes first (Sheng et al. 2024, section 4).

    def _enter(self, client: str) -> None:
        """One that was away does not bring credit from that time along."""
        if client not in self._served:
            self._served[client] = min(self._served.values(), default=0)

    def _leave(self, client: str) -> None:
        waits = bool(self._waiting.get(client))
        runs = any(each.request.client == client for each in self.running)
        if not waits and not runs:
            self._served.pop(client, None)
            self._waiting.pop(client, None)


def _by_order(sequences: Iterable[Sequence]) -> list[Sequence]:
    return sorted(sequences, key=lambda each: each.order)
