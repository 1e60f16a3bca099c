"""A model is trained, served to the official client, broken while requests come in, and repaired; none is lost.

The server is the process that `equipoise serve` starts; what is done to it goes through its admin port.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import OpenAI

LAYER = "layers.1.mlp"
COLLAPSE = {"fault": "collapse", "layer": LAYER, "expert": 3, "intensity": 30.0}
PROMPTS = ("In the beginning", "def read(self):", "It is a truth", "And the king said", "import os", "The house")


@contextmanager
def served(run: Path) -> Iterator[tuple[str, httpx.Client]]:
    """The address of the API, and a client for the admin port."""
    options = ["--port", "0", "--admin-port", "0", "--recover", "--flush-s", "0.5", "--out", str(run / "serving")]
    command = [sys.executable, "-m", "equipoise", "serve", str(run), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        said = ""
        while "token in" not in said:
            line = server.stdout.readline()
            assert line, "the server has ended"
            said += line
        url, admin = re.findall(r"at (http://\S+?)/(?:v1|admin)", said)
        bearer = f"Bearer {(run / 'serving' / 'admin_token').read_text()}"
        with httpx.Client(base_url=f"{admin}/admin", headers={"authorization": bearer}, timeout=60) as operator:
            yield url, operator
        server.terminate()  # it finishes what is open
        server.stdout.read()
    assert server.returncode == 0


def kinds(state: dict) -> list[str]:
    """What fires."""
    return [alert["rule"] for alert in state["alerts"]]


with tempfile.TemporaryDirectory() as folder:
    run = Path(folder) / "tiny"
    train = [sys.executable, "-m", "equipoise", "train", "tiny", "--steps", "80", "--out", str(run), "--json"]
    subprocess.run(train, check=True, stdout=subprocess.DEVNULL)
    with served(run) as (url, operator):
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        answers, marked, began, seen = 0, 0, time.monotonic(), False
        while time.monotonic() < began + 120:
            reply = client.completions.with_raw_response.create(
                model="tiny", prompt=[f"{text} {answers}" for text in PROMPTS], max_tokens=24
            )
            assert len(reply.parse().choices) == len(PROMPTS)
            answers += len(PROMPTS)
            marked += "x-equipoise-degraded" in reply.headers
            if answers == 10 * len(PROMPTS):
                print(f"after {answers} answers: {operator.post('faults', json={'fault': COLLAPSE}).json()['fault']}")
            firing = kinds(operator.get("state").json())
            if "collapse" in firing and not seen:
                seen = True
                print(f"after {answers} answers: noticed, and being repaired")
            if seen and "collapse" not in firing:
                break
        assert seen, "the collapse was not noticed"
        assert marked, "no response said that it may be worse than usual"
        assert "collapse" not in kinds(operator.get("state").json())
        print(f"after {answers} answers: resolved; {marked} responses were marked as degraded, none was lost")
