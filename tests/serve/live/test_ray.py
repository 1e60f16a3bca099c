"""Two replicas behind Ray Serve, as a process: the official client, both are used, one is killed, nothing stays behind.

Needs Ray (the extra `ray`), and 2 CPUs.
"""

import os
import re
import secrets
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.serve.api.serving import wait_until

from equipoise.monitor.store import RunStore
from equipoise.serve.replicas import merged

SRC = Path(__file__).parents[3] / "src"
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'equipoise[ray]'")
COUNTER = "equipoise_serve_requests"


HEAD = """
import signal
from ray.cluster_utils import Cluster
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
print("at", cluster.address, flush=True)
signal.sigwait({signal.SIGTERM})
cluster.shutdown()
"""


def environment_for(cluster=None):
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    environment.pop("RAY_ADDRESS", None)
    return {**environment, **(cluster or {})}


def serve_command(run, num, out, port=0):
    command = [sys.executable, "-m", "equipoise", "serve", str(run), "--ray", str(num), "--port", str(port)]
    return [*command, "--out", str(out)]


class Fleet:
    """`equipoise serve RUN --ray 2` in another process, on a cluster of its own."""

    def __init__(self, run, out, num=2, port=0, cluster=None):
        self.out = out
        command = [*serve_command(run, num, out, port), "--flush-s", "0.2", "--cache-gb", "0.1"]
        environment = {**environment_for(cluster), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self.lines, self.url = [], ""
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"metrics at (http://127\.0\.0\.1:\d+)/metrics", line):
                self.url = found[1]
                return
        raise AssertionError("".join(self.lines))

    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=60)

    def counted(self):
        """Completions answered, by replica, as /metrics has it."""
        found = {}
        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text):
            for sample in family.samples:
                if sample.name == f"{COUNTER}_total" and sample.labels["endpoint"] == "/v1/completions":
                    found[sample.labels["replica"]] = found.get(sample.labels["replica"], 0) + sample.value
        return found

    def processes(self):
        """Of the whole cluster: (id, name)."""
        children = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                number, rest = path.read_text().split(" (", 1)
            except OSError:  # it has ended meanwhile
                continue
            name, fields = rest.rsplit(") ", 1)
            if fields[0] != "Z":
                children.setdefault(int(fields.split()[1]), []).append((int(number), name))
        found = [(self.process.pid, "driver")]
        for number, _ in found:
            found += children.get(number, [])
        return found

    def replicas(self):
        """Ids of the processes that serve."""
        return [number for number, name in self.processes() if name.startswith("ray::ServeRepl")]


@pytest.fixture(scope="module")
def fleet(trained, tmp_path_factory):
    fleet = Fleet(trained, tmp_path_factory.mktemp("fleet") / "replicas")
    yield fleet
    if fleet.process.poll() is None:
        fleet.process.terminate()
        fleet.process.communicate(timeout=120)


@needs_ray
class TestFleet:
    """In this order: each test leaves the fleet whole, and the last one ends it."""

    def test_both_replicas_answer_the_same_streaming_or_not(self, fleet):
        client = fleet.client()
        whole = [client.completions.create(model="run", prompt="The", max_tokens=12, seed=3) for _ in range(20)]
        [text] = {each.choices[0].text for each in whole}
        for _ in range(5):
            pieces = list(client.completions.create(model="run", prompt="The", max_tokens=12, seed=3, stream=True))
            assert len(pieces) > 1
            assert "".join(piece.choices[0].text for piece in pieces) == text
        assert wait_until(lambda: sum(fleet.counted().values()) == 25, 30)
        assert len(fleet.counted()) == 2
        assert all(fleet.counted().values())
        assert {path.name for path in fleet.out.iterdir()} == set(fleet.counted())

    def test_errors_and_health_come_through(self, fleet):
        assert httpx.get(f"{fleet.url}/health").json()["status"] == "ok"
        assert httpx.get(f"{fleet.url}/v1/nothing").json()["error"]["code"] == "unknown_url"
        assert httpx.post(f"{fleet.url}/admin/drain", json={}).status_code == 404
        with pytest.raises(openai.NotFoundError):
            fleet.client().completions.create(model="other", prompt="x")

    def test_a_client_that_goes_away_is_not_computed_for(self, fleet):
        stream = fleet.client().completions.create(model="run", prompt="The", max_tokens=100, n=16, stream=True)
        next(iter(stream))
        stream.close()
        gone = f'{COUNTER}_total{{endpoint="/v1/completions",replica="'
        assert wait_until(
            lambda: any(
                line.startswith(gone) and 'status="499"' in line
                for line in httpx.get(f"{fleet.url}/metrics").text.splitlines()
            ),
            30,
        )

    def test_requests_go_on_when_a_replica_is_killed_and_it_is_replaced(self, fleet):
        before, client = fleet.replicas(), fleet.client()
        assert len(before) == 2
        known = {path.name for path in fleet.out.iterdir()}
        os.kill(before[0], signal.SIGKILL)
        for _ in range(20):
            assert client.completions.create(model="run", prompt="The", max_tokens=4).choices[0].text
        assert wait_until(lambda: len({path.name for path in fleet.out.iterdir()} - known) == 1, 60)
        assert wait_until(lambda: len(fleet.replicas()) == 2, 60)
        assert client.completions.create(model="run", prompt="The", max_tokens=4).choices[0].text

    def test_sigterm_finishes_what_is_open_and_nothing_stays_behind(self, fleet):
        processes = {number for number, _ in fleet.processes()}
        assert len(processes) > 5
        stream = fleet.client().completions.create(model="run", prompt="The", max_tokens=100, stream=True)
        next(iter(stream))
        fleet.process.send_signal(signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason in ("length", "stop")
        out, _ = fleet.process.communicate(timeout=120)
        assert fleet.process.returncode == 0, out
        assert out.endswith("stopped\n")
        assert wait_until(lambda: not [number for number in processes if Path(f"/proc/{number}").exists()], 30)
        finished = []
        for path in fleet.out.iterdir():
            with RunStore.open_readonly(path) as store:
                finished.append(store.meta()["status"])
        assert finished.count("finished") == 2  # one that was killed could not say it


def ended(command, cluster=None):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment_for(cluster), check=False
    )


@pytest.fixture
def cluster(tmp_path):
    """A cluster that somebody else has started: the environment that finds it."""
    token = {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment_for(token),
    )
    address = next(line.split()[1] for line in head.stdout if line.startswith("at "))
    yield {**token, "RAY_ADDRESS": address}
    head.terminate()
    head.communicate(timeout=60)


@needs_ray
def test_on_a_cluster_of_others(trained, tmp_path, cluster):
    fleet = Fleet(trained, tmp_path / "first", num=1, cluster=cluster)
    client = fleet.client()
    assert client.completions.create(model="run", prompt="The", max_tokens=4).choices[0].text
    again = ended(serve_command(trained, 1, tmp_path / "again"), cluster)
    assert again.returncode == 2
    assert "serves equipoise-run already" in again.stderr
    assert client.completions.create(model="run", prompt="The", max_tokens=4).choices[0].text  # it was left alone
    fleet.process.terminate()
    fleet.process.communicate(timeout=120)
    assert fleet.process.returncode == 0
    assert httpx.get(f"{fleet.url}/-/healthz").status_code == 200  # Ray Serve is not ours to end
    elsewhere = ended(serve_command(trained, 1, tmp_path / "elsewhere"), cluster)
    assert elsewhere.returncode == 2
    assert "--host and --port must be its own" in elsewhere.stderr


@needs_ray
@pytest.mark.parametrize(
    ("number", "message"), [("0", "ray: expected 1 replica or more, got 0"), ("999", "999 replicas need 999 CPUs")]
)
def test_what_cannot_be(trained, tmp_path, number, message):
    done = ended(serve_command(trained, number, tmp_path / "x"))
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed: nothing is missing")
def test_without_ray_it_says_what_to_install(trained, tmp_path):
    done = ended(serve_command(trained, 2, tmp_path / "x"))
    assert done.returncode != 0
    assert "pip install 'equipoise[ray]'" in done.stderr


def test_metrics_of_several_are_one_family_with_a_label():
    text = '# HELP a_total All.\n# TYPE a_total counter\na_total{x="1"} 2.0\n# HELP b Now.\n# TYPE b gauge\nb 1.0\n'
    found = merged({"p": text, "q": text.replace("2.0", "3.0")})[0].decode()
    assert found.count("# TYPE a_total counter") == 1
    assert 'a_total{replica="p",x="1"} 2.0\na_total{replica="q",x="1"} 3.0' in found
    assert 'b{replica="p"} 1.0\nb{replica="q"} 1.0' in found
    assert merged({})[0] == b""
