"""`equipoise serve` as a process of a test's, its admin port, and users of it."""

import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai

SRC = Path(__file__).parents[3] / "src"


class Process:
    """A server in another process; everything it prints is kept."""

    def __init__(self, run, *options, env=None):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SRC), **(env or {})}
        command = [sys.executable, "-m", "equipoise", "serve", str(run), "--port", "0", "--admin-port", "0", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.lines = []
        self.url = self._find(r" at (http://127\.0\.0\.1:\d+)/v1")
        self.admin = self._find(r"admin at (http://127\.0\.0\.1:\d+/admin)")

    def _find(self, pattern):
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError(f"{self.lines}\n{self.process.stderr.read()}")

    def end(self):
        """(exit code, all that was printed, errors)."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, "".join(self.lines) + out, err


@contextmanager
def serving(run, *options, env=None):
    server = Process(run, *options, env=env)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate(timeout=60)


def operator(server):
    token = (server.out / "admin_token").read_text()
    return httpx.Client(base_url=server.admin, headers={"authorization": f"Bearer {token}"}, timeout=60)


def wait_for(look, seconds=60.0):
    until = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < until
        threading.Event().wait(0.05)
    return found


@contextmanager
def users(server, number, max_tokens=16, model="run"):
    """So many users at work, each with one request after the other; yields what failed so far."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    stop, failed = threading.Event(), []

    def work(own):
        count = 0
        while not stop.is_set():
            count += 1
            try:
                client.completions.create(model=model, prompt=f"{own} The king {count}", max_tokens=max_tokens)
            except openai.APIError as error:
                failed.append(error)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield failed
    finally:
        stop.set()
        for thread in threads:
            thread.join()
