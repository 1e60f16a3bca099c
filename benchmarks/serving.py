"""What the serving benchmarks share: a run folder with random weights, and a real `equipoise serve` process.

Linux: memory and processor time of the process are read from /proc.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import string
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from equipoise.disk.checkpoint import save_checkpoint
from equipoise.models.config import DecoderConfig
from equipoise.models.decoder import Decoder
from equipoise.models.run_files import cast
from equipoise.models.tokenizer import Tokenizer

START_S, STOP_S = 120.0, 90.0


# ------------------------------------------------------------------------------------------------- a model


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """All bytes, then pairs and triples of letters, then the end of a document. It has learned nothing."""
    letters = string.ascii_letters
    words = ("".join(each) for length in (2, 3) for each in itertools.product(letters, repeat=length))
    more = [word.encode() for word in itertools.islice(words, vocab_size - 257)]
    pieces = [bytes([byte]) for byte in range(256)] + more
    return Tokenizer("letters", {piece: rank for rank, piece in enumerate(pieces)})


def random_model(config: DecoderConfig, dtype: torch.dtype) -> Decoder:
    """Weights that are the same each time, and exact in bf16: every engine gets the same numbers in either type.

    Single bytes and the end of a document are never the likeliest: greedy answers are whole letters, of full length.
    """
    torch.manual_seed(0)
    model = Decoder(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model.embed_tokens.weight.data[[*range(256), config.vocab_size - 1]] = 0.0
    cast(model, dtype)
    return model


def write_run(folder: Path, model: Decoder) -> Path:
    """A run folder that can be served."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"name": folder.name, "model": json.loads(model.config.to_json())}))
    byte_tokenizer(model.config.vocab_size).save(folder)
    save_checkpoint(folder / "checkpoints", 0, {"model": model.state_dict()}, {})
    return folder


# ------------------------------------------------------------------------------------------------- a process


@dataclass(frozen=True)
class Usage:
    """Of a process. cpu_s: processor seconds so far, all threads."""

    cpu_s: float
    rss_mib: float


def usage_of(pid: int) -> Usage:
    """Read from /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    ticks = int(fields[11]) + int(fields[12])  # user and system
    return Usage(ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / 2**20)


@dataclass(frozen=True, eq=False)
class Server:
    """A process that listens. api: "http://127.0.0.1:1234/v1". admin: of the verbs, "" where there are none."""

    process: subprocess.Popen[str]
    api: str
    admin: str = ""
    token: str = ""
    folder: Path = Path()

    @property
    def root(self) -> str:
        """Of the public port."""
        return self.api.removesuffix("/v1")

    def usage(self) -> Usage:
        """Of its process."""
        return usage_of(self.process.pid)

    def stop(self) -> int:
        """SIGTERM, and the exit code; a process that does not end is killed, and that is an error."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise RuntimeError(f"the server did not end within {STOP_S:g} s of SIGTERM; see its log") from None


@contextmanager
def served(run: Path, out: Path, *options: str, log: Path) -> Iterator[Server]:
    """`equipoise serve` on free ports of this machine, with its records in `out` and its output in `log`."""
    command = [sys.executable, "-m", "equipoise", "serve", str(run), "--port", "0", "--admin-port", "0"]
    command += ["--out", str(out), *options]

    def address(text: str) -> tuple[str, ...] | None:
        api, admin = re.search(r" at (http://\S+/v1) ", text), re.search(r"^admin at (\S+),", text, re.MULTILINE)
        return (api[1], admin[1]) if api and admin else None

    with listening(command, address, log) as (process, (api, admin)):
        yield Server(process, api, admin, (out / "admin_token").read_text(), out)


@contextmanager
def listening(
    command: Sequence[str], address: Callable[[str], Any], log: Path
) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """A process, once `address` finds in its output where it listens. Killed at the end, if it is still there."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(int(START_S / 0.1)):
            if found := address(log.read_text()):
                break
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended with {process.returncode}: {log.read_text()[-2000:]}")
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        else:
            raise RuntimeError(f"no address within {START_S:g} s: {log.read_text()[-2000:]}")
        yield process, found
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
