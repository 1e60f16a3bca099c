"""Compile one C++ source of this folder on its first use, keep the result, load it.

A source has plain C functions on pointers, called through ctypes, and includes no header but this folder's: it
compiles in a second or two, and any torch can load it. It is compiled for the machine that it runs on. Whatever stands
in the way is a reason in words and never an exception: callers take their pure torch path instead.

Threads are torch's own. The library is linked to the OpenMP runtime that torch has loaded, so `#pragma omp parallel`
meets torch's pool and `torch.set_num_threads`; a second runtime would put two threads on each core.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-fopenmp")
SECONDS = 120  # that a compiler may take


class _UnbuiltError(Exception):
    """Why there is no library."""


@dataclass(frozen=True, eq=False)
class Built:
    """A loaded library and where it lies, or None, None and the reason why there is none."""

    library: ctypes.CDLL | None
    path: Path | None
    reason: str


def cache_folder() -> Path:
    """Where compiled libraries are kept, a folder for each of source, compiler, flags, torch and CPU."""
    return Path.home() / ".cache" / "equipoise" / "native"


@cache
def cpu_features() -> frozenset[str]:
    """The instruction sets of this CPU by Linux's names, e.g. avx512_bf16; empty where they can't be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


@cache
def load(source: str, needs: tuple[str, ...] = ()) -> Built:
    """The library of SOURCES / source, compiled if it must be. needs: features of the CPU that it can't do without."""
    return build(SOURCES / source, needs, cache_folder())


def build(source: Path, needs: tuple[str, ...], folder: Path) -> Built:
    """The same for any source and folder. Processes that start together wait for the first one's result."""
    try:
        if missing := [name for name in needs if name not in cpu_features()]:
            raise _UnbuiltError(f"this CPU has no {' and no '.join(missing)}")
        path = _compiled(source, folder)
        return Built(ctypes.CDLL(str(path)), path, f"compiled from {source.name}")
    except _UnbuiltError as error:
        return Built(None, None, str(error))
    except OSError as error:  # a full or read-only disk, a library that doesn't load
        return Built(None, None, f"{source.name} could not be compiled or loaded: {error}")


def openmp_runtime() -> Path | None:
    """The file of the OpenMP runtime that torch's threads come from, or None where it has none that Linux shows."""
    torch.get_num_threads()  # torch has loaded it by now
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    files = dict.fromkeys(Path(line.split(maxsplit=5)[5]) for line in lines if len(line.split(maxsplit=5)) == 6)
    runtimes = [file for file in files if file.name.startswith(("libgomp", "libiomp5", "libomp"))]
    beside_torch = [file for file in runtimes if Path(torch.__file__).parent.parent in file.parents]
    return next(iter(beside_torch or runtimes), None)


def _compiled(source: Path, folder: Path) -> Path:
    """The library's file in its own folder below `folder`."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise _UnbuiltError(f"no C++ compiler on the path ({', '.join(COMPILERS)})")
    runtime = openmp_runtime()
    if runtime is None:
        raise _UnbuiltError("torch's OpenMP runtime was not found")
    version = _run([compiler, "--version"], source)
    key = "\n".join((version, *FLAGS, torch.__version__, str(runtime), *sorted(cpu_features())))
    headers = b"".join(file.read_bytes() for file in sorted(source.parent.glob("*.h")))
    digest = hashlib.sha256(source.read_bytes() + headers + key.encode()).hexdigest()[:20]
    path = folder / digest / f"{source.stem}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent / "lock"):
            if not path.exists():  # nobody else made it while this process waited
                _compile(compiler, source, runtime, path)
    return path


def _compile(compiler: str, source: Path, runtime: Path, path: Path) -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=path.parent) as temporary:
        unlinked, linked = Path(temporary) / "unlinked.o", Path(temporary) / path.name
        _run([compiler, *FLAGS, "-c", str(source), "-o", str(unlinked)], source)
        # Not -fopenmp: it would add the system's runtime to torch's.
        _run([compiler, "-shared", str(unlinked), str(runtime), "-o", str(linked)], source)
        linked.replace(path)
    seconds = time.perf_counter() - start
    print(f"equipoise: compiled {source.name} in {seconds:.1f} s, kept in {path.parent}", file=sys.stderr)


def _run(command: list[str], source: Path) -> str:
    """What the command prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise _UnbuiltError(f"{command[0]} took more than {SECONDS} s for {source.name}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
        raise _UnbuiltError(f"{command[0]} could not compile {source.name}: {lines[0].strip()}")
    return done.stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. The lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:
        raise _UnbuiltError("this system has no file locks of POSIX") from None
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
