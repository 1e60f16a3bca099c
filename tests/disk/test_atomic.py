"""Files that are whole or not there."""

from pathlib import Path

import pytest

from equipoise.disk.atomic import DiskError, atomic_write


def test_atomic_write_leaves_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "deep" / "file"
    with atomic_write(path) as file:
        file.write(b"old")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"new")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_atomic_write_says_why_it_could_not(tmp_path):
    Path(tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(DiskError, match=r"could not write .*inside: .*another disk"),
        atomic_write(tmp_path / "file" / "inside") as file,
    ):
        file.write(b"x")
