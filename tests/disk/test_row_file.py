"""A file that stays open: rows are those of the format's own library, and a file that changes is noticed."""

import os
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from equipoise.disk.atomic import DiskError, atomic_path
from equipoise.disk.row_file import RowFile, RowFileError
from equipoise.disk.rows import lay_out, write_rows

TENSORS = {
    "a": torch.randn(5, 3, 4),
    "b": torch.randn(7, 2).to(torch.bfloat16),
    "c": torch.arange(6, dtype=torch.int64),
    "d": torch.randint(0, 255, (3, 8), dtype=torch.uint8),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "t.safetensors", {"of": "a test"})
    return tmp_path / "t.safetensors"


def test_rows_and_wholes_are_those_of_the_library(path):
    file = RowFile(path)
    assert file.metadata == {"of": "a test"}
    for name, tensor in load_file(path).items():
        assert torch.equal(file.whole(name), tensor)
        for index in range(len(tensor)):
            assert torch.equal(file.row(name, index), tensor[index])
    file.close()
    file.close()
    with pytest.raises(RowFileError, match="is closed"):
        file.row("a", 0)


def test_what_was_read_is_nobody_elses(path):
    file = RowFile(path)
    file.row("a", 1).zero_()
    assert torch.equal(file.row("a", 1), TENSORS["a"][1])
    file.close()


def test_read_in_inference_mode_it_is_an_ordinary_tensor(path):
    file = RowFile(path)
    with torch.inference_mode():
        assert not file.row("a", 0).is_inference()
    file.close()


def test_rows_that_are_not_there(path):
    file = RowFile(path)
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"a has rows 0 to 4, asked for {index}"):
            file.row("a", index)
    file.close()


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_a_file_that_is_not_whole_is_not_opened(path, size):
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(RowFileError, match=r"t\.safetensors: .*restore it"):
        RowFile(path)


def test_something_else_is_not_opened(path):
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{no json at all.")
    with pytest.raises(RowFileError, match="its header is damaged"):
        RowFile(path)


def test_cut_short_while_in_use(path):
    file, size = RowFile(path), path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(RowFileError, match=rf"changed while it was in use: it had {size:,} bytes and has {size - 1:,}"):
        file.row("a", 0)
    file.close()


def test_written_to_while_in_use(path):
    file = RowFile(path)
    with path.open("r+b") as other:
        other.seek(-1, os.SEEK_END)
        other.write(b"x")
    os.utime(path, ns=(1, 1))  # a coarse clock may not have moved
    with pytest.raises(RowFileError, match="changed while it was in use: it was written to"):
        file.row("a", 0)
    file.close()


def test_replaced_or_removed_it_is_still_there(path, tmp_path):
    file = RowFile(path)
    save_file({"a": torch.zeros(5, 3, 4)}, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    assert torch.equal(file.row("a", 2), TENSORS["a"][2])
    path.unlink()
    assert torch.equal(file.row("a", 3), TENSORS["a"][3])
    file.close()


def test_from_many_threads(path):
    file, wrong = RowFile(path), []

    def read():
        for n in range(200):
            if not torch.equal(file.row("a", n % 5), TENSORS["a"][n % 5]):
                wrong.append(n)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    file.close()


def test_laid_out_with_notes(tmp_path):
    path = tmp_path / "made"
    lay_out(path, {"x": (torch.float32, (3, 2))}, {"origin": "here"})
    write_rows(path, {"x": (torch.ones(1, 2), [1])})
    file = RowFile(path)
    assert file.metadata == {"origin": "here"}
    assert file.whole("x").tolist() == load_file(path)["x"].tolist() == [[0, 0], [1, 1], [0, 0]]
    file.close()


def test_a_path_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"

    def half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        half()
    assert list(path.parent.iterdir()) == []
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    with pytest.raises(DiskError, match="could not write"), atomic_path(path):
        pass  # nobody wrote anything
    assert path.read_bytes() == b"whole"


def test_into_memory_that_is_there(path):
    file, out = RowFile(path), torch.empty(3, 4)
    assert file.row("a", 4, out) is out
    assert torch.equal(out, TENSORS["a"][4])
    with pytest.raises(ValueError, match=r"out: expected contiguous torch.float32 of \(3, 4\), got .* of \[4, 3\]"):
        file.row("a", 4, out.t())
    file.close()
