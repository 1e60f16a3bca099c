"""A dashboard in a process of its own, and a browser to look at it with."""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SERVER = """
import sys
from pathlib import Path
from equipoise.dashboard import serve
serve([Path(each) for each in sys.argv[2:]], port=0, token=sys.argv[1] or None, ready=lambda a: print(a, flush=True))
"""


@dataclass(frozen=True)
class Answer:
    """What the server said."""

    status: int
    text: str
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Served:
    """A running dashboard. address: as it was announced, with a token where there is one. log: its stderr."""

    address: str
    log: Path

    @property
    def base(self) -> str:
        parts = urlsplit(self.address)
        return f"{parts.scheme}://{parts.netloc}"

    @property
    def port(self) -> int:
        return urlsplit(self.address).port

    def get(self, path: str, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            text = response.read().decode()
            return Answer(response.status, text, {key.lower(): value for key, value in response.getheaders()})
        finally:
            connection.close()


@contextmanager
def serving(folder: Path, *paths: Path, token: str = "") -> Iterator[Served]:
    log = folder / "server.log"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NICEGUI_STORAGE_PATH": str(folder / "nicegui")}
    environment.pop("PYTEST_CURRENT_TEST", None)  # NiceGUI would take itself to be under test
    command = [sys.executable, "-c", SERVER, token, *map(str, paths)]
    pipes = {"stdout": subprocess.PIPE, "text": True, "cwd": folder, "env": environment}
    with log.open("w") as errors, subprocess.Popen(command, stderr=errors, **pipes) as process:
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("http://"), f"the server did not start:\n{log.read_text()}"
            yield Served(address, log)
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.fixture(scope="session")
def browser():
    """Chromium, driven by Playwright; skips where one of the two is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if path is None:
        pytest.skip(f"needs a browser, none of {', '.join(CHROMIUMS)} is on the PATH: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def nicegui():
    pytest.importorskip("nicegui", reason="needs the extra: pip install 'equipoise[dashboard]'")
