"""The tutorials, to the letter: every block of a page is run in order, from an empty folder.

A comment before a block changes that: `<!-- run: background -->` starts it and goes on, `<!-- run: no, why -->` leaves
it out. Python blocks of a page are one session. Ports are replaced by free ones.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

PORTS = ("8000", "8001", "9090", "9093", "9099", "9469")
PAGES = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.md"))
SLOW = {"upcycle-and-serve"}  # downloads 93 MB, and trains 692 M parameters
BLOCK = re.compile(r"(?:<!-- run: (?P<how>[^>]+) -->\n)?```(?P<kind>sh|python)\n(?P<text>.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    kind: str
    how: str
    text: str


def blocks(page):
    text = page.read_text()
    for port in PORTS:
        with socket.create_server(("127.0.0.1", 0)) as free:
            text = text.replace(port, str(free.getsockname()[1]))
    return [Block(found["kind"], found["how"] or "", found["text"]) for found in BLOCK.finditer(text)]


SESSION = """if True:
    import json, sys
    names = {"__name__": "__main__"}
    for line in sys.stdin:
        exec(compile(json.loads(line), "tutorial", "exec"), names)
        print("DONE", flush=True)
"""
LIMIT = 240  # seconds, of a block


class Terminal:
    """Runs blocks in a folder. What runs in the background is ended by its id."""

    def __init__(self, folder):
        self.folder, self.session, self.running = folder, None, []
        self.said = (folder / "said.txt").open("a")
        bin = str(Path(sys.executable).parent)
        self.environment = os.environ | {
            "OMP_NUM_THREADS": "1", "PATH": f"{bin}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": "lo"
        }  # fmt: skip

    def run(self, block):
        if block.how.startswith("no"):
            return
        if block.kind == "python":
            self._run_python(block.text)
            return
        process = self._start(["bash", "-euo", "pipefail", "-c", block.text], stdout=self.said)
        if block.how == "background":
            self.running.append(process)
            self._wait_for_server(block.text)
            return
        try:
            code = process.wait(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the shell and what it waits for
            code = process.wait()
        assert code == 0, f"{block.text}\n{self._heard()}"

    def _run_python(self, text):
        if self.session is None:
            self.session = self._start([sys.executable, "-c", SESSION], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.session.stdin.write(json.dumps(text) + "\n")
        self.session.stdin.flush()
        for line in self.session.stdout:
            if line == "DONE\n":
                return
        raise AssertionError(f"{text}\n{self._heard()}")

    def _start(self, command, **pipes):
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stderr=self.said, start_new_session=True, text=True, **pipes
        )

    def _heard(self):
        return (self.folder / "said.txt").read_text()

    def _wait_for_server(self, text):
        if not (port := re.search(r"serve .*--port (\d+)", text)):
            return
        until = time.monotonic() + 300
        while time.monotonic() < until and self.running[-1].poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port[1]}/health/ready", timeout=5)
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self._heard())

    def end(self):
        for process in self.running:
            process.terminate()
            process.wait(timeout=60)
        if self.session is not None:
            self.session.communicate(timeout=60)
        self.said.close()


def pages():
    return [pytest.param(page, marks=pytest.mark.slow if page.stem in SLOW else (), id=page.stem) for page in PAGES]


@pytest.mark.parametrize("page", pages())
def test_to_the_letter(page, tmp_path):
    terminal = Terminal(tmp_path)
    try:
        for block in blocks(page):
            terminal.run(block)
    finally:
        terminal.end()


def test_there_are_six_and_each_runs_something():
    assert len(PAGES) == 6
    for page in PAGES:
        assert any(not block.how.startswith("no") for block in blocks(page))
