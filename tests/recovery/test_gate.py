"""Many forwards or one change: who waits for whom, shown with real threads and no reliance on time."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from equipoise.recovery.gate import Gate, GateTimeoutError

PATIENCE = 20.0  # seconds after which a test fails; none of them waits for it when all is well


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


class Forward:
    """A forward in a thread of its own, that runs until it is told to end."""

    def __init__(self, pool, gate, log=None, name="forward"):
        self.began, self.end = threading.Event(), threading.Event()
        self._gate, self._log, self._name = gate, log, name
        self._future = pool.submit(self._run)

    def _run(self):
        with self._gate.running():
            if self._log is not None:
                self._log.append(self._name)
            self.began.set()
            assert self.end.wait(PATIENCE)

    def finish(self):
        self.end.set()
        self._future.result(PATIENCE)

    def running(self):
        assert self.began.wait(PATIENCE)
        return self


def wait_until_blocked(gate, number):
    """Until so many threads, forwards and changes, are blocked in the gate: only then is it seen that they wait."""
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.002)):
        if len(gate._condition._waiters) == number:
            return
        pause.wait(0.002)
    raise AssertionError(f"{len(gate._condition._waiters)} threads wait, not {number}")


def test_forwards_run_at_once(gate, pool):
    together = threading.Barrier(8, timeout=PATIENCE)  # passes only when all eight are inside

    def forward():
        with gate.running():
            together.wait()

    for future in [pool.submit(forward) for _ in range(8)]:
        future.result(PATIENCE)


def test_a_change_waits_for_every_forward_and_later_forwards_for_the_change(gate, pool):
    log = []
    forwards = [Forward(pool, gate).running() for _ in range(3)]
    inside, leave = threading.Event(), threading.Event()

    def change():
        with gate.changing(3 * PATIENCE):  # it has to be woken: to look again when its time is over is too late
            log.append("change")
            inside.set()
            assert leave.wait(PATIENCE)
            log.append("changed")

    changed = pool.submit(change)
    wait_until_blocked(gate, 1)
    later = [Forward(pool, gate, log, "later") for _ in range(3)]  # while the change waits, and the three run
    wait_until_blocked(gate, 4)
    for forward in forwards:
        assert not inside.is_set()
        forward.finish()
    assert inside.wait(PATIENCE)
    during = Forward(pool, gate, log, "later")
    wait_until_blocked(gate, 4)
    assert not any(forward.began.is_set() for forward in [*later, during])
    leave.set()
    changed.result(PATIENCE)
    for forward in [*later, during]:
        forward.running().finish()
    assert log == ["change", "changed", *["later"] * 4]


def test_nobody_ever_sees_half_a_change(gate, pool):
    """Two numbers that are always changed together, read by forwards in two steps."""
    pair, rounds = [0, 0], 300

    def change():
        for _ in range(rounds):
            with gate.changing(PATIENCE):
                seen = pair[0]
                pair[0] = seen + 1
                pair[1] = seen + 1

    def forward():
        values = set()
        for _ in range(rounds):
            with gate.running():
                first = pair[0]
                with gate.running():
                    values.add(first - pair[1])
        return values

    changes = [pool.submit(change) for _ in range(3)]
    forwards = [pool.submit(forward) for _ in range(6)]
    assert [future.result(PATIENCE) for future in changes] == [None] * 3
    assert set().union(*(future.result(PATIENCE) for future in forwards)) == {0}
    assert pair == [3 * rounds] * 2  # no change was lost between others


def test_a_nested_forward_goes_on_while_a_change_waits(gate, pool):
    with gate.running():
        changed = pool.submit(lambda: gate.changing(PATIENCE).__enter__())
        wait_until_blocked(gate, 1)
        with gate.running(), gate.running():  # would wait for ever if it queued behind the change
            assert not changed.done()
    changed.result(PATIENCE)


def test_forwards_of_one_thread_may_end_in_any_order(gate):
    """As an event loop's requests do."""
    first, second = gate.running(), gate.running()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="inside running"):
        gate.changing(PATIENCE).__enter__()  # the second one still runs
    second.__exit__(None, None, None)
    with gate.changing(0.0):
        pass


def test_a_change_inside_a_forward_would_wait_for_itself(gate):
    with gate.running(), pytest.raises(RuntimeError, match=r"changing\(\) inside running\(\) of the same thread"):
        gate.changing(PATIENCE).__enter__()
    with gate.changing(0.0):  # nothing is left of it
        pass


def test_a_change_inside_a_change_would_wait_for_itself(gate):
    with gate.changing(0.0), pytest.raises(RuntimeError, match=r"changing\(\) inside changing\(\) of the same thread"):
        gate.changing(PATIENCE).__enter__()
    with gate.changing(0.0):
        pass


def test_a_forward_inside_a_change_of_its_own_thread_runs(gate, pool):
    """As the canary's, which judges the repair before anyone else sees it."""
    with gate.changing(0.0):
        with gate.running():
            other = Forward(pool, gate)
            wait_until_blocked(gate, 1)
            assert not other.began.is_set()
        assert not other.began.is_set()
    other.running().finish()


def test_a_change_that_waits_too_long_says_for_whom(gate, pool):
    forwards = [Forward(pool, gate).running() for _ in range(2)]
    message = r"2 forwards were still running after 0.01 s, the oldest for \d+\.\d s; nothing was changed"
    with pytest.raises(GateTimeoutError, match=message), gate.changing(0.01):
        raise AssertionError("two forwards are running")
    forwards[0].finish()
    with pytest.raises(GateTimeoutError, match=r"1 forward was still running after 0 s"), gate.changing(0.0):
        raise AssertionError("one forward is running")
    later = Forward(pool, gate).running()  # the change that gave up keeps nobody waiting
    later.finish()
    forwards[1].finish()
    with gate.changing(0.0):
        pass


def test_forwards_that_waited_behind_a_change_go_on_when_it_gives_up(gate, pool):
    first = Forward(pool, gate).running()
    change = pool.submit(lambda: gate.changing(1.0).__enter__())
    wait_until_blocked(gate, 1)
    second = Forward(pool, gate)
    with pytest.raises(GateTimeoutError):
        change.result(PATIENCE)
    second.running().finish()
    first.finish()


def test_the_time_of_a_forward_does_not_count_its_waiting(gate, pool, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("equipoise.recovery.gate.time.monotonic", lambda: now[0])
    with gate.changing():
        forward = Forward(pool, gate)
        wait_until_blocked(gate, 1)
        now[0] = 160.0  # however long the change takes
    forward.running()
    now[0] = 161.5
    younger = Forward(pool, gate).running()
    now[0] = 162.5
    with pytest.raises(GateTimeoutError, match=r"2 forwards .*, the oldest for 2\.5 s"), gate.changing(0.0):
        raise AssertionError("two forwards are running")
    forward.finish()
    younger.finish()


def test_a_change_behind_another_change_says_so(gate, pool):
    with gate.changing(0.0):
        waiting = pool.submit(lambda: gate.changing(0.0).__enter__())
        with pytest.raises(GateTimeoutError, match=r"another change took longer than 0 s; nothing was changed"):
            waiting.result(PATIENCE)


@pytest.mark.parametrize("kind", ["running", "changing"])
def test_what_raises_lets_go(gate, pool, kind):
    with pytest.raises(ZeroDivisionError), getattr(gate, kind)():
        raise ZeroDivisionError
    with gate.changing(0.0):
        pass
    Forward(pool, gate).running().finish()


def test_a_nested_forward_that_raises_leaves_the_outer_one_running(gate, pool):
    with gate.running():
        with pytest.raises(ZeroDivisionError), gate.running():
            raise ZeroDivisionError
        with pytest.raises(GateTimeoutError, match="1 forward was"):
            pool.submit(lambda: gate.changing(0.0).__enter__()).result(PATIENCE)
    with gate.changing(0.0):
        pass
