"""Run tests against copies of the package, each with one mistake in it, in forks of this process.

The parent imports once what is heavy (torch, pytest), and never equipoise; each fork imports its copy and runs its
tests. It needs Linux. Which mistakes, and what to say about them, is up to `tests.mutation.run`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.mutation.mutants import Mutant

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "equipoise"
AT_ONCE = 2
SECONDS = 120  # for one mutant; one that takes longer never ends
HEAVY = ("torch.utils.checkpoint", "torch._dynamo", "array_api_compat.torch", "hypothesis.strategies", "pytest")
FAILED = 1  # pytest's exit status when a test failed. 2 to 5 are errors, or that there was no test
BROKEN = 90  # ours: the package could not be imported
ASSERTIONS = (
    "assert",
    "AssertionError",
    "Failed:",
)  # how messages of tests that failed begin, not of ones that crashed

Job = tuple[Mutant | None, tuple[str, ...]]  # tests to run on the code with this mistake, or on the code as it is


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant. status: "killed", "survived", or what is wrong with it.

    killer: the test that failed. message: its first line, or the end of the output if no test failed.
    """

    name: str
    status: str
    killer: str
    message: str
    seconds: float


class Witness:
    """A pytest plugin that remembers the first failure."""

    def __init__(self) -> None:
        self.killer = self.message = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest after each phase of a test."""
        if report.failed and not self.killer:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = (crash.message if crash else str(report.longrepr)) if report.when == "call" else report.when
            self.killer, self.message = report.nodeid, text.splitlines()[0]


# ---------------------------------------------------------------------------------------------- in the child


def child(folder: Path, nodes: Sequence[str]) -> NoReturn:
    """Run the tests and leave, without the parent's clean-up. All output goes to a file in the folder."""
    status = BROKEN
    try:
        signal.alarm(SECONDS)
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, sys.stdout.fileno())
        os.dup2(output, sys.stderr.fileno())
        status = run_tests(folder, nodes)
    except Exception:  # whatever a broken module raises when it is imported
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_tests(folder: Path, nodes: Sequence[str]) -> int:
    """Import the package from the folder and run the tests against it; pytest's exit status."""
    import pytest

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # no test here needs a plugin, and they take a second
    sys.path.insert(0, str(folder))  # before the editable install
    package = importlib.import_module("equipoise")
    if not Path(package.__file__ or "").is_relative_to(folder):
        raise ImportError(f"equipoise: expected the copy in {folder}, got {package.__file__}")
    for name in package.__all__:
        getattr(package, name)  # imported now, where a mistake means that the copy does not import
    witness = Witness()
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *nodes], plugins=[witness])
    (folder / "witness.json").write_text(json.dumps(vars(witness)))
    return int(status)


# ---------------------------------------------------------------------------------------------- in the parent


def warm() -> None:
    """Import what is heavy, with one thread: a fork has no others, and their pool would wait for them for ever."""
    if "equipoise" in sys.modules:
        raise RuntimeError("equipoise is imported already: forks would test it instead of the copy; use a new process")
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # NumPy starts its threads when imported
    importlib.import_module("torch").set_num_threads(1)
    for name in HEAVY:
        importlib.import_module(name)
    sys.dont_write_bytecode = True
    gc.freeze()  # what is here stays: children need not look through it for garbage
    # Python 3.12 warns of a fork beside other threads, which may hold a lock. Should a library have started one all the
    # same, it has nothing to do: this process only waits.
    warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)


def broken_copy(folder: Path, mutant: Mutant | None) -> None:
    """Copy the package and make the mistake. Raises ValueError for a table that no longer fits the code."""
    shutil.copytree(PACKAGE, folder / "equipoise", ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is None:
        return
    path = folder / "equipoise" / mutant.file
    text = path.read_text(encoding="utf-8")
    if (found := text.count(mutant.old)) != 1:
        raise ValueError(
            f"{mutant.name}: expected {mutant.old!r} once in {mutant.file}, found it {found} times; mend the table"
        )
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def run_jobs(jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
    """(number of the job, outcome) as the jobs end."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(number) for number in range(len(jobs))]
        for folder, (mutant, _) in zip(folders, jobs, strict=True):
            broken_copy(folder, mutant)
        running: dict[int, tuple[int, float]] = {}
        started = 0
        try:
            while started < len(jobs) or running:
                while started < len(jobs) and len(running) < AT_ONCE:
                    if (pid := os.fork()) == 0:
                        child(folders[started], jobs[started][1])
                    running[pid] = started, time.monotonic()
                    started += 1
                pid, status = os.wait()
                number, start = running.pop(pid)
                yield number, judged(jobs[number][0], folders[number], status, round(time.monotonic() - start, 1))
        finally:  # nobody wants the others any more
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def judged(mutant: Mutant | None, folder: Path, status: int, seconds: float) -> Outcome:
    """What the way in which the child ended means."""
    file, output = folder / "witness.json", (folder / "output.txt").read_text(errors="replace")
    witness = json.loads(file.read_text()) if file.exists() else {"killer": "", "message": ""}
    code = os.waitstatus_to_exitcode(status)  # below 0: a signal's number
    meanings = {0: "survived", FAILED: "killed", BROKEN: "wrong: does not import", -signal.SIGALRM: "wrong: never ends"}
    verdict = meanings.get(code, f"wrong: ended with {code}")
    if verdict == "killed" and not witness["message"].startswith(ASSERTIONS):
        verdict = "wrong: crashes"  # or a fixture fails
    if not witness["killer"] and verdict != "survived":
        witness["message"] = output[-500:]
    return Outcome("" if mutant is None else mutant.name, verdict, **witness, seconds=seconds)
