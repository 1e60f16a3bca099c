"""Requests come, are cancelled, time out and are computed anew at any moment: each ends once, with its own tokens."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.serve.small import EOT, TOKENIZER, assert_nothing_leaks, assert_same, greedy, tiny_engine, tiny_model, whole

from equipoise.serve.reference import answer
from equipoise.serve.request import Request, Sampling
from equipoise.serve.scheduler import Limits

MODEL = tiny_model(num_layers=1, dim=16, num_heads=2, max_seq_len=48)
_expected = {}


def expected(request):
    """What the slow twin answers; each different request once."""
    key = (request.prompt, request.max_tokens, request.sampling.temperature)
    if key not in _expected:
        _expected[key] = answer(MODEL, TOKENIZER, request)
    return _expected[key]


class EngineMachine(RuleBasedStateMachine):
    """Few tokens and few blocks, so that prefixes are shared and room is short."""

    def __init__(self):
        super().__init__()
        limits = Limits(max_running=4, tokens_per_step=7, decode_batch=3, group_by_experts=True, max_skips=2)
        self.engine = tiny_engine(MODEL, num_blocks=7, block_size=4, limits=limits)
        self.asked: dict[str, Request] = {}
        self.pieces: dict[str, list] = {}
        self.finished: set[str] = set()

    def take(self, outputs):
        for output in outputs:
            assert output.id not in self.finished, "it has ended already"
            self.pieces.setdefault(output.id, []).append(output)
            if output.finish is not None:
                self.finished.add(output.id)

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        max_tokens=st.integers(1, 10),
        temperature=st.sampled_from([0.0, 1.0]),
        client=st.sampled_from("ab"),
        deadline=st.sampled_from([None, None, None, 0.0]),
    )
    def add(self, prompt, max_tokens, temperature, client, deadline):
        id = str(len(self.asked))
        ids = frozenset({EOT})
        request = Request(
            id, tuple(prompt), max_tokens, Sampling(temperature), stop_ids=ids, client=client, deadline=deadline
        )
        self.engine.add(request)
        self.asked[id] = request

    @precondition(lambda self: self.engine.has_work)
    @rule(steps=st.integers(1, 4))
    def step(self, steps):
        for _ in range(steps):
            self.take(self.engine.step())

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data):
        self.take(self.engine.cancel(data.draw(st.sampled_from(sorted(self.asked)))))

    @rule()
    def forget_cache(self):
        self.engine.forget_cache()

    @invariant()
    def blocks_are_used_by_those_who_run(self):
        pool, scheduler = self.engine.pool, self.engine.scheduler
        users = Counter(block for each in scheduler.running for block in each.blocks)
        assert [users[block] for block in range(pool.num_blocks)] == pool._references
        assert pool.num_free + len(users) == pool.num_blocks
        assert all(not each.blocks for each in scheduler.waiting)
        open_now = sorted(each.request.id for each in [*scheduler.running, *scheduler.waiting])
        assert open_now == sorted(self.asked.keys() - self.finished)

    def teardown(self):
        for _ in range(2000):
            if not self.engine.has_work:
                break
            self.take(self.engine.step())
        assert self.finished == self.asked.keys()
        assert_nothing_leaks(self.engine)
        for id, request in self.asked.items():
            got, want = whole(self.pieces[id]), expected(request)
            if got.finish in ("cancelled", "deadline"):
                assert got.token_ids == want.token_ids[: len(got.token_ids)]
            else:
                assert_same(got, want)
        assert_same(whole(self.again()), expected(greedy("again", [0, 1] * 6)))

    def again(self):
        """One more, in the blocks that the others have left."""
        self.engine.add(greedy("again", [0, 1] * 6))
        pieces = []
        while self.engine.has_work:
            pieces += self.engine.step()
        self.engine.close()
        return pieces


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
