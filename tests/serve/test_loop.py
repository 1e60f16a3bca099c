"""Many tasks, one engine thread: everybody gets their own pieces, leaves when they like, and hears of the end."""

import asyncio
import threading
from contextlib import contextmanager

import pytest
import torch
from tests.serve.small import (
    TOKENIZER,
    assert_nothing_leaks,
    assert_same,
    greedy,
    mixed_requests,
    tiny_engine,
    tiny_model,
    whole,
)

from equipoise.serve.engine import OverloadedError
from equipoise.serve.loop import DrainingError, EngineLoop, StoppedError
from equipoise.serve.reference import SlowEngine, answer
from equipoise.serve.request import RequestError
from equipoise.serve.scheduler import Limits

PROMPT = tuple(range(40, 61))
TIMEOUT = 30.0


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@contextmanager
def started(engine, **options):
    loop = EngineLoop(engine, **options)
    loop.start()
    try:
        yield loop
    finally:
        loop.stop()
    assert loop.state == "ended"


async def collect(loop, request):
    return whole([output async for output in loop.stream(request)])


def run(work):
    return asyncio.run(asyncio.wait_for(work, TIMEOUT))


class Held:
    """A `running` context that lets a step begin only when it is told to."""

    def __init__(self):
        self.steps = threading.Semaphore(0)
        self.waits = threading.Event()

    @contextmanager
    def __call__(self):
        self.waits.set()
        assert self.steps.acquire(timeout=TIMEOUT)
        self.waits.clear()
        yield

    def let(self, number=10_000):
        self.steps.release(number)


@pytest.mark.parametrize("slow", [False, True])
def test_many_tasks_each_get_their_own(model, slow):
    requests = mixed_requests(20, seed=5)
    engine = SlowEngine(model, TOKENIZER) if slow else tiny_engine(model)

    async def work(loop):
        return await asyncio.gather(*(collect(loop, request) for request in requests))

    with started(engine) as loop:
        for request, got in zip(requests, run(work(loop)), strict=True):
            assert_same(got, answer(model, TOKENIZER, request))
        assert loop.progress().num_open == 0
        assert loop.progress().num_steps > 0


def test_tasks_in_several_event_loops(model):
    got = {}

    def client(loop, id):
        got[id] = run(collect(loop, greedy(id, [*PROMPT, ord(id)])))

    with started(tiny_engine(model)) as loop:
        threads = [threading.Thread(target=client, args=(loop, id)) for id in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
    for id in "abcd":
        assert_same(got[id], answer(model, TOKENIZER, greedy(id, [*PROMPT, ord(id)])))


def test_leaving_early_cancels(model):
    engine = tiny_engine(model)

    async def work(loop):
        stream = loop.stream(greedy("a", PROMPT, 60))
        first = await anext(stream)
        await stream.aclose()
        task = asyncio.create_task(collect(loop, greedy("b", PROMPT, 60)))
        other = await collect(loop, greedy("c", PROMPT, 3))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.wrap_future(loop.between_steps(lambda: None))  # what was posted before it is done
        assert not engine.has_work
        return first, other

    with started(engine) as loop:
        first, other = run(work(loop))
        assert first.finish is None
        assert other.finish == "length"
        assert loop.progress().num_open == 0
    assert_nothing_leaks(engine)


def test_cancelled_before_the_engine_has_taken_it(model):
    engine, held = tiny_engine(model), Held()

    async def work(loop):
        first = asyncio.create_task(collect(loop, greedy("a", PROMPT, 2)))
        assert await asyncio.to_thread(held.waits.wait, TIMEOUT)
        second = asyncio.create_task(collect(loop, greedy("b", PROMPT, 2)))
        while loop.progress().num_open < 2:
            await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        held.let()
        return await first

    with started(engine, running=held) as loop:
        assert run(work(loop)).finish == "length"
        assert loop.drain(TIMEOUT)
    assert_nothing_leaks(engine)


def test_refused_requests_leave_nothing_behind(model):
    engine = tiny_engine(model)
    added = []

    async def work(loop):
        with pytest.raises(RequestError, match="prompt: expected token ids"):
            await anext(loop.stream(greedy("a", [999]), lambda: added.append("a")))
        stream = loop.stream(greedy("a", PROMPT, 60), lambda: added.append("a again"))
        await anext(stream)
        with pytest.raises(RequestError, match="id: expected a new one, 'a' is being served"):
            await anext(loop.stream(greedy("a", PROMPT)))
        return [await anext(stream), *[piece async for piece in stream]]  # the first one goes on

    with started(engine) as loop:
        assert run(work(loop))[-1].finish == "length"
        assert loop.progress().num_open == 0
    assert added == ["a again"]
    assert_nothing_leaks(engine)


def test_who_is_done_does_not_end_the_next_one_of_the_same_name(model):
    async def work(loop):
        first = loop.stream(greedy("a", PROMPT, 2))
        while (await anext(first)).finish is None:
            pass
        second = loop.stream(greedy("a", PROMPT, 40))
        pieces = [await anext(second)]
        await first.aclose()
        return whole([*pieces, *[piece async for piece in second]])

    with started(tiny_engine(model)) as loop:
        assert_same(run(work(loop)), answer(model, TOKENIZER, greedy("a", PROMPT, 40)))


def test_too_many_open_or_waiting(model):
    held = Held()

    async def work(loop):
        tasks = [asyncio.create_task(collect(loop, greedy(id, PROMPT, 2))) for id in "ab"]
        assert await asyncio.to_thread(held.waits.wait, TIMEOUT)
        with pytest.raises(OverloadedError, match="2 requests are open already"):
            await anext(loop.stream(greedy("c", PROMPT)))
        held.let()
        await asyncio.gather(*tasks)
        return await collect(loop, greedy("c", PROMPT, 2))

    with started(tiny_engine(model), running=held, max_open=2) as loop:
        assert run(work(loop)).finish == "length"

    async def flood(loop):
        results = await asyncio.gather(
            *(collect(loop, greedy(str(n), PROMPT, 2)) for n in range(20)), return_exceptions=True
        )
        return [result for result in results if isinstance(result, OverloadedError)]

    limits = Limits(max_running=1, tokens_per_step=64, max_waiting=3)
    with started(tiny_engine(model, limits=limits)) as loop:
        assert run(flood(loop))
        assert loop.progress().num_open == 0


def test_draining_finishes_what_is_open_and_refuses_more(model):
    held = Held()

    async def work(loop):
        task = asyncio.create_task(collect(loop, greedy("a", PROMPT, 5)))
        assert await asyncio.to_thread(held.waits.wait, TIMEOUT)
        assert not loop.drain(0.0)
        assert loop.draining
        with pytest.raises(DrainingError, match="shutting down and takes no new requests"):
            await anext(loop.stream(greedy("b", PROMPT)))
        held.let()
        assert await asyncio.to_thread(loop.drain, TIMEOUT)
        assert (await task).finish == "length"
        loop.resume()
        return await collect(loop, greedy("c", PROMPT, 2))

    with started(tiny_engine(model), running=held) as loop:
        assert run(work(loop)).finish == "length"


def test_stopping_tells_everybody(model):
    held = Held()

    async def work(loop):
        tasks = [asyncio.create_task(collect(loop, greedy(id, PROMPT, 60))) for id in "ab"]
        assert await asyncio.to_thread(held.waits.wait, TIMEOUT)
        late = asyncio.create_task(collect(loop, greedy("late", PROMPT)))  # in the inbox when the thread ends
        call = loop.between_steps(lambda: None)
        while loop.progress().num_open < 3:
            await asyncio.sleep(0)
        stopped = asyncio.create_task(asyncio.to_thread(loop.stop))
        while not loop.stopping:
            await asyncio.sleep(0)
        held.let()
        await stopped
        for task in tasks:
            assert ((await task).finish, (await task).error) == ("cancelled", "the server has stopped")
        with pytest.raises(StoppedError, match="the server has stopped"):
            await late
        with pytest.raises(StoppedError, match="the server has stopped"):
            call.result(TIMEOUT)
        with pytest.raises(StoppedError, match="the engine has been stopped"):
            await anext(loop.stream(greedy("c", PROMPT)))
        with pytest.raises(StoppedError, match="the engine has been stopped"):
            loop.between_steps(lambda: None)

    with started(tiny_engine(model), running=held) as loop:
        run(work(loop))
        assert loop.progress().num_open == 0


def test_an_error_in_the_thread_reaches_everybody(model):
    held = Held()

    class Broken(SlowEngine):
        def step(self):
            raise MemoryError("no more")

    async def work(loop):
        tasks = [asyncio.create_task(collect(loop, greedy(id, PROMPT))) for id in "abc"]
        assert await asyncio.to_thread(held.waits.wait, TIMEOUT)
        held.let()
        for task in tasks:
            result = (await asyncio.gather(task, return_exceptions=True))[0]
            if not isinstance(result, StoppedError):  # it was still in the inbox
                assert (result.finish, result.error) == ("failed", "MemoryError: no more")
        with pytest.raises(StoppedError, match="MemoryError: no more"):
            await anext(loop.stream(greedy("d", PROMPT)))
        assert loop.drain(TIMEOUT)

    with started(Broken(model, TOKENIZER), running=held) as loop:
        run(work(loop))
        progress = loop.progress()
        assert (progress.error, progress.num_open, progress.num_steps) == ("MemoryError: no more", 0, 0)


def test_calls_between_steps_are_made_in_the_engines_thread(model):
    with started(tiny_engine(model)) as loop:
        assert loop.between_steps(lambda: threading.current_thread().name).result(TIMEOUT) == "engine"
        with pytest.raises(ZeroDivisionError):
            loop.between_steps(lambda: 1 / 0).result(TIMEOUT)
        assert run(collect(loop, greedy("a", PROMPT, 2))).finish == "length"  # it goes on


def test_a_call_between_steps_may_end_a_request(model):
    async def work(loop):
        stream = loop.stream(greedy("a", PROMPT, 70))
        await anext(stream)
        await asyncio.wrap_future(loop.between_steps(lambda: loop.cancel("a", "deadline")))
        return [piece async for piece in stream][-1]

    with started(tiny_engine(model)) as loop:
        assert run(work(loop)).finish == "deadline"


def test_changed_weights_between_two_steps():
    model, other = tiny_model(), tiny_model(seed=1)
    with started(tiny_engine(model)) as loop:
        run(collect(loop, greedy("a", PROMPT, 3)))
        with torch.no_grad():
            model.load_state_dict(other.state_dict())
        loop.forget_cache()
        got = run(collect(loop, greedy("b", PROMPT, 6)))
        assert got.num_cached == 0
    assert_same(got, answer(other, TOKENIZER, greedy("b", PROMPT, 6)))


def test_progress_counts_only_while_there_is_work(model):
    clock, held = [100.0], Held()

    async def work(loop, id):
        clock[0] += 5000.0  # idle until now
        task = asyncio.create_task(collect(loop, greedy(id, PROMPT[:9], 2)))
        assert await asyncio.to_thread(held.waits.wait, TIMEOUT)
        assert loop.progress().seconds == 0.0
        clock[0] += 7.0  # the step doesn't come
        assert loop.progress().seconds == 7.0
        num_steps = loop.progress().num_steps
        held.let(1)
        while loop.progress().num_steps == num_steps:
            await asyncio.sleep(0)
        assert loop.progress().seconds == 0.0
        held.let(1)
        await task

    with started(tiny_engine(model), running=held, clock=lambda: clock[0]) as loop:
        for id in "ab":
            run(work(loop, id))
            for _ in range(10_000):  # until the thread waits
                if loop._idle:
                    break
                threading.Event().wait(0.001)
            assert loop.progress().seconds == 0.0
        assert loop.progress().num_steps == 4  # a prompt and one more token, twice


def test_a_thread_that_is_stuck_in_a_call_makes_no_progress(model):
    """As soon as somebody waits for it."""
    clock, go, stuck = [0.0], threading.Event(), threading.Event()

    async def work(loop):
        task = asyncio.create_task(collect(loop, greedy("a", PROMPT, 2)))
        while loop.progress().num_open < 1:
            await asyncio.sleep(0)
        assert loop.progress().seconds == 60.0
        go.set()
        return await task

    with started(tiny_engine(model), clock=lambda: clock[0]) as loop:
        try:
            loop.between_steps(lambda: stuck.set() or go.wait(TIMEOUT))
            assert stuck.wait(TIMEOUT)
            clock[0] = 60.0
            assert loop.progress().seconds == 0.0
            assert run(work(loop)).finish == "length"
        finally:
            go.set()


def test_states(model):
    loop = EngineLoop(tiny_engine(model))
    assert loop.state == "new"
    loop.start()
    assert loop.state == "running"
    loop.stop()
    loop.stop()
    assert loop.state == "ended"
