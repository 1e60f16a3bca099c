"""Programs from Debian packages, unpacked into a cache and not installed: real servers to test against.

The cache is ~/.cache/equipoise/debian, or debian/ in EQUIPOISE_TEST_CACHE. Where a package can't be had, the test is
skipped and says why.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

TIMEOUT_S = 120


def binary(package: str, path_in_package: str) -> Path:
    """The program at e.g. "usr/bin/amtool" of a package; fetched once."""
    folder = _cache() / package
    if not folder.is_dir():
        _fetch(package, folder)
    path = folder / path_in_package
    assert path.is_file(), f"{package} has no {path_in_package}"
    return path


def _cache() -> Path:
    chosen = os.environ.get("EQUIPOISE_TEST_CACHE")
    return Path(chosen) / "debian" if chosen else Path.home() / ".cache" / "equipoise" / "debian"


def _fetch(package: str, folder: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            pytest.skip(f"the Debian package {package} can't be fetched: no {tool} here")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as name:
        work = Path(name)
        _download(package, work)
        [archive] = work.glob("*.deb")
        _run(["dpkg-deb", "-x", str(archive), "unpacked"], package, work)
        try:
            (work / "unpacked").rename(folder)  # at once, so that a folder that is there is whole
        except OSError:
            assert folder.is_dir()  # another test run was faster


def _download(package: str, work: Path) -> None:
    """With the system's package lists, or with lists of our own where it has none; nothing of the system is changed."""
    ours = ["-o", f"Dir::State::Lists={work}/lists", "-o", f"Dir::Cache={work}/cache", "-o", "APT::Sandbox::User=root"]
    for folder in ("lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    try:
        subprocess.run(["apt-get", "download", package], cwd=work, capture_output=True, check=True, timeout=TIMEOUT_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        _run(["apt-get", "update", *ours], package, work)
        _run(["apt-get", "download", *ours, package], package, work)


def _run(command: list[str], package: str, work: Path) -> None:
    try:
        subprocess.run(command, cwd=work, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the Debian package {package} can't be fetched: {command[0]} took over {TIMEOUT_S} s")
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or "").strip().splitlines()[-1:]
        pytest.skip(f"the Debian package {package} can't be fetched: {' '.join(command[:2])}: {' '.join(said)}")


def relocated(package: str, path_in_package: str, *, folder: str) -> Path:
    """A copy of the program that reads what it would read in the absolute `folder` from its working directory.

    For programs with a folder of the system compiled in. Every "/usr/share/x" in it becomes "./", with as many
    slashes as keep its length, so that nothing in the file moves.
    """
    program = binary(package, path_in_package)
    wanted = folder.encode()
    copy = program.with_name(f"{program.name}-relocated")
    if not copy.exists():
        data = program.read_bytes()
        assert wanted in data, f"{package} does not mention {folder}"
        new = program.with_name(f"{program.name}-{os.getpid()}")
        new.write_bytes(data.replace(wanted, b"." + b"/" * (len(wanted) - 1)))
        new.chmod(0o755)
        new.rename(copy)
    return copy
