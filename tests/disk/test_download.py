"""Packages as files, through the real pip, from a folder in place of a registry."""

import zipfile

import pytest

from equipoise.disk.download import DownloadError, download_wheel


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder with one wheel; pip looks nowhere else."""
    folder = tmp_path / "registry"
    folder.mkdir()
    info = "small-1.0.dist-info"
    with zipfile.ZipFile(folder / "small-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("small/text.txt", "what it is fetched for")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def test_a_wheel_is_fetched_as_a_file(registry, tmp_path):
    wheel = download_wheel("small", tmp_path)
    assert wheel.parent == tmp_path
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("small/text.txt") == b"what it is fetched for"


def test_a_package_that_is_not_there_is_an_error_with_what_pip_said(registry, tmp_path):
    with pytest.raises(DownloadError, match=r"pip download .* absent' failed: .*No matching distribution"):
        download_wheel("absent", tmp_path)
    assert not list(tmp_path.glob("*.whl"))
