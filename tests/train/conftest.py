"""A small training run for the tests of this folder: real text of two domains, one MoE model, seconds on one core."""

import json
import subprocess
import sys
import sysconfig
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from equipoise.layer import Capacity
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.monitor.store import RunStore, StoreError
from equipoise.routing import QuantileBalance, SwitchLoss, TopK, ZLoss
from equipoise.train.config import DataConfig, OptimConfig, TrainConfig

SRC = Path(__file__).parents[2] / "src"
DOMAINS = {
    "text": ["textwrap.py", "string.py", "csv.py", "calendar.py"],
    "parsing": ["ast.py", "tokenize.py", "shlex.py", "configparser.py"],
}


@pytest.fixture(autouse=True)
def _bits_of_one_thread(one_thread):
    """The bits of a sum depend on the number of threads: child processes and this one use one."""


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    """Python's standard library in documents of 2000 characters, as .jsonl."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    rows = []
    for domain, names in DOMAINS.items():
        for name in names:
            text = (folder / name).read_text(encoding="utf-8")[:16_000]
            rows += [{"text": text[i : i + 2000], "domain": domain} for i in range(0, len(text), 2000)]
    path = tmp_path_factory.mktemp("corpus") / "stdlib.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_config(corpus_file):
    """A run of 12 steps of 8 x 32 tokens; `moe`, `optim` and `data` override fields of those parts.

    Everything that could go wrong in a resume is in it: micro-batches, a loss over the global batch, noise in the
    router's input, random drops, an active balancer, windows of 4 steps with checkpoints every 5.
    """

    def make(*, moe=None, optim=None, data=None, **overrides):
        moe_config = MoEConfig(
            num_experts=8,
            hidden_dim=32,
            router=TopK(k=2, jitter=0.1),
            balance=(SwitchLoss(coef=0.01, scope="global"), ZLoss(coef=0.001), QuantileBalance()),
            capacity=Capacity(factor=1.25, policy="random"),
        )
        model = DecoderConfig(
            vocab_size=320,
            dim=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            hidden_dim=64,
            max_seq_len=64,
            moe=replace(moe_config, **(moe or {})),
        )
        tokens = DataConfig(
            corpus=str(corpus_file), vocab_size=320, seq_len=32, val_fraction=0.1, cache_dir=corpus_file.parent
        )
        defaults = {"steps": 12, "batch_size": 8, "micro_batch_size": 4, "bf16": False, "eval_every": 6}
        defaults |= {"eval_batches": 2, "checkpoint_every": 5, "watch_every": 4}
        return TrainConfig(
            name="test",
            model=model,
            data=replace(tokens, **(data or {})),
            optim=OptimConfig(**{"lr": 3e-3, "warmup": 5} | (optim or {})),
            **(defaults | overrides),
        )

    return make


def run_history(out):
    """All that a run has recorded, but for what a clock says: scalars, routing, alerts, repairs."""
    with RunStore.open_readonly(out) as store:
        names = [name for (name,) in store.rows("SELECT DISTINCT name FROM scalars ORDER BY name")]
        scalars = {name: [row[:2] for row in store.scalar_history(name)] for name in names if name != "tokens_per_s"}
        routing = {
            layer: [asdict(stats) | {"counts_E": stats.counts_E.tolist()} for stats in store.routing_history(layer)]
            for layer in store.layers()
        }
        return {"scalars": scalars, "routing": routing, "alerts": store.alerts(), "actions": store.actions()}


@pytest.fixture(scope="session")
def history():
    return run_history


@pytest.fixture(scope="session")
def step_of():
    """The last step that a running process has recorded; 0 before it has."""

    def step(out):
        with suppress(StoreError), RunStore.open_readonly(out) as store:
            return max((step for step, _, _ in store.scalar_history("loss", last=1)), default=0)
        return 0

    return step


TRAIN = """
import sys
from pathlib import Path
import torch
from equipoise.train.config import TrainConfig
from equipoise.train.report import Silent
from equipoise.train.run import train

torch.set_num_threads(1)
out, config = Path(sys.argv[1]), sys.argv[2]
config = TrainConfig.from_json(Path(config).read_text()) if config else None
result = train(config, out, Silent(), resume=config is None)
print(result.step, result.signal)
"""


@pytest.fixture
def child(tmp_path):
    """Start Python on a script, by default one that trains: with `config` a new run, without it goes on."""

    @contextmanager
    def start(out, config=None, script=TRAIN):
        file = ""
        if config is not None:
            file = str(tmp_path / "child.json")
            Path(file).write_text(config.to_json(), encoding="utf-8")
        command = [sys.executable, "-c", script, str(out), file]
        environment = {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "PATH": ""}
        pipe, same = subprocess.PIPE, subprocess.STDOUT
        with subprocess.Popen(command, env=environment, stdout=pipe, stderr=same, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    return start


@pytest.fixture(scope="session")
def wait_until():
    """Wait for a condition while the process lives, looking every `pause` seconds."""

    def wait(condition, process, seconds=60, pause=0.005):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true"
            with suppress(subprocess.TimeoutExpired):
                output, _ = process.communicate(timeout=pause)
                pytest.fail(f"the process ended with {process.returncode} before the condition came true: {output}")

    return wait
