"""C++ on first use: whose threads it has, what is kept, and that nothing that goes wrong is an exception."""

import ctypes
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from equipoise.ops.native import build as native

SOURCE = r"""
#include <omp.h>
extern "C" int num_threads() {
    int n = 0;
#pragma omp parallel
#pragma omp atomic
    n += 1;
    return n;
}
extern "C" double sum(const double* x, long n) {
    double total = 0;
    for (long i = 0; i < n; i++) total += x[i];
    return total;
}
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "small.cpp"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """One library for the tests that only look at it."""
    path = tmp_path_factory.mktemp("native") / "small.cpp"
    path.write_text(SOURCE)
    return usable(native.build(path, (), path.parent))


def usable(built: native.Built) -> native.Built:
    if built.library is None and "compiler on the path" in built.reason:
        pytest.skip(built.reason)
    assert built.library is not None, built.reason
    return built


def test_it_computes_on_a_tensor_where_it_lies(built):
    x = torch.arange(10, dtype=torch.float64)
    built.library.sum.restype = ctypes.c_double
    assert built.library.sum(ctypes.c_void_p(x.data_ptr()), ctypes.c_long(10)) == 45.0


def test_threads_are_those_of_torch(built):
    """As many as torch has, by torch's own runtime: no second one was loaded."""
    before = torch.get_num_threads()
    try:
        for count in (1, 3, 2):
            torch.set_num_threads(count)
            assert built.library.num_threads() == count
    finally:
        torch.set_num_threads(before)
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert loaded == {str(native.openmp_runtime())}


def test_another_thread_of_python_has_as_many(built):
    """OpenMP counts threads for each caller; `torch.get_num_threads`, which bindings call, sets it for a new one."""
    counts = []

    def count():
        torch.get_num_threads()
        counts.append((built.library.num_threads(), torch.get_num_threads()))

    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    assert counts[0][0] == counts[0][1]


def test_a_second_load_takes_what_is_kept_of_the_same_source_and_headers(source, capfd):
    first = usable(native.build(source, (), source.parent / "kept"))
    assert capfd.readouterr().err.count("compiled small.cpp") == 1
    second = native.build(source, (), source.parent / "kept")
    assert second.path == first.path
    assert not capfd.readouterr().err
    source.write_text(SOURCE + "\n")
    third = native.build(source, (), source.parent / "kept")
    assert third.path != first.path
    (source.parent / "shared.h").write_text("// something")
    assert native.build(source, (), source.parent / "kept").path not in (first.path, third.path)


def test_processes_that_start_together_compile_once(source, built):
    code = (
        "import sys; from pathlib import Path; from equipoise.ops.native.build import build\n"
        "assert build(Path(sys.argv[1]), (), Path(sys.argv[2])).library is not None"
    )
    command = [sys.executable, "-c", code, str(source), str(source.parent / "kept")]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=100)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert "".join(said).count("compiled small.cpp") == 1
    assert sorted(path.name for path in (source.parent / "kept").glob("*/*")) == ["lock", "small.so"]


def test_what_does_not_compile_is_a_reason_and_leaves_nothing(source, built):
    source.write_text("int f() { return unknown; }")
    failed = native.build(source, (), source.parent / "kept")
    assert failed.library is None
    assert "could not compile small.cpp" in failed.reason
    assert "unknown" in failed.reason
    assert [path.name for path in (source.parent / "kept").glob("*/*")] == ["lock"]


def test_a_folder_that_is_none_is_a_reason(source, built):
    (source.parent / "file").write_text("")
    failed = native.build(source, (), source.parent / "file")
    assert failed.library is None
    assert "could not be compiled or loaded" in failed.reason


def test_a_missing_instruction_set_is_a_reason(source):
    failed = native.build(source, ("avx9", "avx10_x"), source.parent)
    assert failed.reason == "this CPU has no avx9 and no avx10_x"


def test_a_compiler_that_takes_too_long_is_a_reason(source, built, monkeypatch):
    monkeypatch.setattr(native, "SECONDS", 0.001)  # no compiler starts in a thousandth
    failed = native.build(source, (), source.parent)
    assert failed.library is None
    assert "took more than 0.001 s for small.cpp" in failed.reason


def test_no_compiler_is_a_reason(source, monkeypatch):
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    failed = native.build(source, (), source.parent)
    assert failed.reason == "no C++ compiler on the path (no-such-compiler)"
