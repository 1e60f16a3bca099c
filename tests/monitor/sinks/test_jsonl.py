"""The log of lines: all that was seen, readable at any moment, whatever happened while it was written."""

import os
import signal
import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tests.monitor.sinks.cases import Clock, alert, stats

from equipoise.monitor.sinks.jsonl import JsonLines, read_json_lines
from equipoise.monitor.sinks.line_file import LineFile
from equipoise.monitor.sinks.plain import dump, one_line, plain, rfc3339
from equipoise.types import Action

NOW, TIME = 1_790_000_000.25, "2026-09-21T14:13:20.250Z"


def test_all_that_was_seen_can_be_read(tmp_path):
    path = tmp_path / "logs" / "run.jsonl"
    log = JsonLines(path, clock=Clock(NOW))
    log.routing([stats(), stats("blocks.4.moe", counts_E=(32, 32, 32, 32))])
    log.alert(alert(value=float("nan")))
    log.action(Action("repair", "blocks.3.moe", 60, "why", {"kind": 1.0, "inf": float("inf")}, "undone", "it rose"))
    first, second, fired, repaired = read_json_lines(path)  # before it is closed
    assert (first["record"], first["time"]) == ("routing", TIME)
    assert (first["layer"], first["counts_E"], first["dropped"]) == (
        "blocks.3.moe",
        [40, 0, 60, 28],
        {"capacity": 3, "tokens": 1},
    )
    assert set(first) == {*vars(stats()), "record", "time"}
    assert second["max_violation"] == 0.0
    assert (fired["record"], fired["state"], fired["key"]) == ("alert", "firing", "blocks.3.moe:collapse")
    assert (fired["finding"]["expert"], fired["finding"]["value"]) == (5, "nan")
    assert (repaired["record"], repaired["kind"], repaired["detail"]) == (
        "action",
        "repair",
        {"kind": 1.0, "inf": "inf"},
    )
    assert (repaired["state"], repaired["note"]) == ("undone", "it rose")
    log.close()
    log.close()


def test_a_line_that_was_cut_costs_itself_only(tmp_path):
    path = tmp_path / "run.jsonl"
    JsonLines(path).action(Action("one", "l", 1, ""))
    with path.open("ab") as file:
        file.write(b'{"kind": "tw\xc3')  # a power cut in the middle of a character
    JsonLines(path, sync=True).action(Action("three", "l", 3, ""))
    assert [record["kind"] for record in read_json_lines(path)] == ["one", "three"]
    assert len(path.read_bytes().splitlines()) == 3


def test_a_killed_process_loses_nothing_that_was_written(tmp_path):
    """SIGKILL right after the last line was handed over: no flush at exit can have helped."""
    code = (
        "import os, signal, sys\n"
        "from equipoise.monitor.sinks.jsonl import JsonLines\n"
        "from equipoise.types import Action\n"
        "log = JsonLines(sys.argv[1])\n"
        "for n in range(100): log.action(Action('repair', 'l', n, ''))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "run.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [record["step"] for record in read_json_lines(path)] == list(range(100))


def test_two_writers_do_not_mix_their_lines(tmp_path):
    path = tmp_path / "run.jsonl"
    with LineFile(path) as one, LineFile(path) as two:
        for n in range(50):
            (one if n % 2 else two).append(dump({"n": n, "long": "x" * 5000}))
    assert [record["n"] for record in read_json_lines(path)] == list(range(50))


def test_the_file_is_not_left_to_child_programs(tmp_path):
    with LineFile(tmp_path / "a") as file:
        file.append("x")
        assert not os.get_inheritable(file._file)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner)
       | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_anything_becomes_one_line_of_ascii(value):
    line = dump(value)
    assert line.isascii()
    assert "\n" not in line


def test_numbers_of_numpy_and_halves_of_characters():
    value = {
        "n": np.int64(3),
        "x": np.float32(0.5),
        "nan": np.float64("nan"),
        "a": np.arange(3),
        "t": (1, 2),
        "s": "\ud800x",
    }
    assert plain(value) == {"n": 3, "x": 0.5, "nan": "nan", "a": [0, 1, 2], "t": [1, 2], "s": "?x"}


def test_one_line():
    assert one_line("a\r\nb\tc\x00d\u2028e\u202ef", 100) == "a  b c d ef"
    assert (one_line("abcdef", 4), one_line("abcd", 4)) == ("abc…", "abcd")
    assert rfc3339(NOW) == TIME
