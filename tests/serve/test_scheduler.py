"""Who is computed next: answers before prompts, clients in turn, the first comers always, and nobody left out."""

from collections import Counter

import pytest

from equipoise.serve.blocks import BlockPool
from equipoise.serve.request import Request
from equipoise.serve.scheduler import Limits, Scheduler
from equipoise.serve.sequence import Sequence


class Played:
    """A scheduler whose pieces are computed at once; every answer goes on to its max_tokens."""

    def __init__(self, *, num_blocks=100, block_size=4, **limits):
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(self.pool, Limits(**limits))
        self.num_added = 0
        self.ended: list[str] = []

    def add(self, id, num_prompt=4, max_tokens=4, client=""):
        self.num_added += 1
        prompt = tuple(self.num_added * 1000 + n for n in range(num_prompt))  # nothing to share
        sequence = Sequence(Request(id, prompt, max_tokens, client=client), self.num_added)
        self.scheduler.add(sequence)
        return sequence

    def step(self):
        """{id: number of tokens} of one step."""
        pieces = self.scheduler.schedule()
        assert sum(piece.num_tokens for piece in pieces) <= self.scheduler.limits.tokens_per_step
        assert len({piece.sequence for piece in pieces}) == len(pieces)
        for piece in pieces:
            self.scheduler.computed(piece)
            sequence = piece.sequence
            if piece.is_last:
                sequence.tokens.append(0)
                if len(sequence.tokens) - len(sequence.request.prompt) == sequence.request.max_tokens:
                    self.scheduler.remove(sequence)
                    self.ended.append(sequence.request.id)
        return {piece.sequence.request.id: piece.num_tokens for piece in pieces}

    def play(self):
        """All steps until nothing is left."""
        steps = []
        while step := self.step():
            steps.append(step)
            assert len(steps) < 2000
        assert (self.pool.num_used, self.scheduler.num_waiting, self.scheduler.running) == (0, 0, [])
        return steps


def test_answers_first_then_prompts_in_pieces():
    played = Played(max_running=4, tokens_per_step=6)
    played.add("a", num_prompt=2)
    played.add("b", num_prompt=11)
    assert played.step() == {"a": 2, "b": 4}
    assert played.step() == {"a": 1, "b": 5}
    played.add("c", num_prompt=3)
    assert played.step() == {"a": 1, "b": 2, "c": 3}
    assert played.step() == {"a": 1, "b": 1, "c": 1}


def test_as_many_answers_as_there_is_room_for_leave_one_token_for_prompts():
    played = Played(max_running=3, tokens_per_step=4)
    for id in "ab":
        played.add(id, num_prompt=1, max_tokens=20)
    played.step()
    played.add("c", num_prompt=6)
    steps = [played.step() for _ in range(3)]
    assert steps == [{"a": 1, "b": 1, "c": 2}] * 3


def test_one_client_s_flood_does_not_hold_up_another():
    played = Played(max_running=4, tokens_per_step=64)
    for n in range(50):
        played.add(f"flood {n}", client="a")
    played.step()
    played.add("single", client="b")
    played.play()
    assert played.ended.index("single") <= 8  # with the next ones that are admitted, not after 50


def test_clients_who_ask_together_share_the_first_places():
    played = Played(max_running=4, tokens_per_step=64)
    for n in range(20):
        played.add(f"flood {n}", client="a")
    played.add("single", client="b")
    assert "single" in played.step()


def test_clients_are_served_alike_in_tokens():
    """One sends long prompts, the other short ones: while both wait they get about the same number of tokens."""
    played = Played(max_running=2, tokens_per_step=64)
    for n in range(10):
        played.add(f"a{n}", num_prompt=40, client="a")
        for m in range(5):
            played.add(f"b{n}.{m}", num_prompt=5, client="b")
    had = Counter()
    while any(each.request.client == "a" for each in played.scheduler.waiting):
        for id, number in played.step().items():
            had[id[0]] += number
    assert abs(had["a"] - had["b"]) <= 2 * 43  # a whole request of each


def test_who_was_away_brings_no_credit_along():
    played = Played(max_running=1, tokens_per_step=64)
    for n in range(10):
        played.add(f"a{n}", client="a")
    for _ in range(12):
        played.step()
    for n in range(10):
        played.add(f"b{n}", client="b")
    played.play()
    assert Counter(id[0] for id in played.ended[4:12]) == {"a": 4, "b": 4}


def test_who_came_first_is_never_interrupted():
    played = Played(num_blocks=6, max_running=4, tokens_per_step=20)
    first = played.add("first", num_prompt=4, max_tokens=19)
    for id in "bcd":
        played.add(id, num_prompt=3, max_tokens=12)
    preempted = 0
    while first.state != "finished":
        assert "first" in played.step()
        preempted = max(preempted, played.scheduler.num_preempted)
    assert preempted > 0
    played.play()
    assert sorted(played.ended) == ["b", "c", "d", "first"]


def test_who_came_last_gives_way():
    played = Played(num_blocks=5, max_running=3, tokens_per_step=20)
    for id in "abc":
        played.add(id, num_prompt=4, max_tokens=12)
    while not played.scheduler.num_preempted:  # until the first one needs a third block
        played.step()
    assert [each.request.id for each in played.scheduler.running] == ["a", "b"]
    assert [each.request.id for each in played.scheduler.waiting] == ["c"]
    played.play()


def test_the_interrupted_wait_in_the_order_of_arrival():
    played = Played(max_running=8, tokens_per_step=64)
    sequences = [played.add(id) for id in "abcd"]
    played.step()
    played.add("e")
    scheduler = played.scheduler
    scheduler.retract([sequences[2]])
    scheduler.retract([sequences[3], sequences[0]])
    assert [each.request.id for each in scheduler.waiting] == ["a", "c", "d", "e"]
    assert [each.request.id for each in scheduler.running] == ["b"]
    played.play()
    assert sorted(played.ended) == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("num_blocks", [4, 5, 7, 11])
@pytest.mark.parametrize("decode_batch", [None, 1, 3])
def test_everybody_is_done_with_hardly_any_room(num_blocks, decode_batch):
    played = Played(num_blocks=num_blocks, max_running=6, tokens_per_step=7, decode_batch=decode_batch)
    for n in range(12):
        played.add(str(n), num_prompt=1 + n % 9, max_tokens=1 + (5 * n) % 7, client=str(n % 3))
    played.play()
    assert sorted(played.ended, key=int) == [str(n) for n in range(12)]


def test_a_limited_decode_batch_takes_turns():
    played = Played(max_running=7, tokens_per_step=64, decode_batch=3)
    for n in range(7):
        played.add(str(n), num_prompt=1, max_tokens=50)
    played.step()
    steps = [played.step() for _ in range(21)]
    assert all(len(step) == 3 for step in steps)
    counts = Counter(id for step in steps for id in step)
    assert set(counts.values()) == {9}


def test_with_grouping_nobody_is_left_out_for_long():
    played = Played(max_running=8, tokens_per_step=64, decode_batch=2, group_by_experts=True, max_skips=5)
    for n in range(8):
        played.add(str(n), num_prompt=1, max_tokens=60).last_experts = (1, 6)[n % 2]
    played.step()
    longest, skipped = 0, Counter()
    for _ in range(40):
        step = played.step()
        for n in range(8):
            skipped[n] = 0 if str(n) in step else skipped[n] + 1
            longest = max(longest, skipped[n])
    assert 5 <= longest <= 5 + 8 // 2 - 1  # all who are due at once go on two at a time


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_running": 0}, "max_running: expected at least 1, got 0"),
        ({"max_skips": 0}, "max_skips: expected at least 1, got 0"),
        ({"decode_batch": 0}, "decode_batch: expected at least 1, or none for all, got 0"),
        (
            {"max_running": 8, "tokens_per_step": 8},
            "tokens_per_step: expected more than max_running = 8, got 8; answers",
        ),
        (
            {"group_by_experts": True},
            "group_by_experts: needs decode_batch; where all answers go on at once there is no",
        ),
    ],
)
def test_limits_out_of_range(limits, message):
    with pytest.raises(ValueError, match=message):
        Limits(**limits)
