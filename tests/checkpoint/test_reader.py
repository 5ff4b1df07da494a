"""Bytes from disk, exactly, through one buffer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moeq.checkpoint.headers import DTYPES, TensorSpec, read_headers
from moeq.checkpoint.reader import TensorReader
from moeq.errors import CheckpointError


def random(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Random bytes, NaNs of every kind among them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def saved(folder: Path, tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    save_file(tensors, folder / "model.safetensors")
    return read_headers([folder / "model.safetensors"])


def same_bytes(found: Tensor, expected: Tensor) -> bool:
    return (found.dtype, found.shape) == (expected.dtype, expected.shape) and torch.equal(
        found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (), (0, 4)])
def test_whole_tensors_are_read_bit_for_bit(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = {"before": random(torch.uint8, 3), "it": random(dtype, *shape, seed=1)}
    specs = saved(tmp_path, tensors)
    with TensorReader() as reader:
        for name in tensors:
            assert same_bytes(reader.read(specs[name]), tensors[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_slices_of_stacked_tensors_are_read_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": random(dtype, 7), "stacked": random(dtype, 5, 3, 11, seed=1)}
    specs = saved(tmp_path, tensors)
    with TensorReader() as reader:
        for index in (4, 0, 2, 2):
            assert same_bytes(reader.read(specs["stacked"], index), tensors["stacked"][index])


@pytest.mark.parametrize("index", [-1, 5])
def test_slices_that_are_not_there_are_refused(index: int, tmp_path: Path) -> None:
    specs = saved(tmp_path, {"stacked": random(torch.int8, 5, 3)})
    with TensorReader() as reader, pytest.raises(AssertionError):
        reader.read(specs["stacked"], index)


def test_the_next_read_overwrites_the_last(tmp_path: Path) -> None:
    tensors = {"a": random(torch.float32, 6, 4), "b": random(torch.float32, 6, 4, seed=1)}
    specs = saved(tmp_path, tensors)
    with TensorReader() as reader:
        first = reader.read(specs["a"])
        second = reader.read(specs["b"], 2)
        assert second.data_ptr() == first.data_ptr()
        assert same_bytes(first[0], tensors["b"][2])
        assert same_bytes(first[1], tensors["a"][1])  # the rest was not touched


def test_the_buffer_grows_to_the_largest_read_and_no_further(tmp_path: Path) -> None:
    specs = saved(tmp_path, {"big": random(torch.int8, 8, 100), "small": random(torch.int8, 10)})
    with TensorReader() as reader:
        reader.read(specs["small"])
        assert reader.read(specs["big"], 3).untyped_storage().nbytes() == 100
        assert reader.read(specs["small"]).untyped_storage().nbytes() == 100
        assert reader.read(specs["big"]).untyped_storage().nbytes() == 800


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    specs = saved(tmp_path, {"a": random(torch.float32, 4, 5), "b": random(torch.int8, 3)})
    seen: list[int] = []
    with TensorReader(seen.append) as reader:
        reader.read(specs["a"], 1)
        reader.read(specs["b"])
        reader.read(specs["a"])
    assert seen == [20, 3, 80]


def test_a_file_that_became_shorter_names_itself_and_the_tensor(tmp_path: Path) -> None:
    specs = saved(tmp_path, {"it": random(torch.int8, 10, 10)})
    file, offset = specs["it"].file, specs["it"].offset
    with open(file, "r+b") as handle:
        handle.truncate(offset + 55)
    with TensorReader() as reader:
        reader.read(specs["it"], 4)  # bytes 40 to 50 are still there
        for index in (5, None, 9):
            at = offset + 90 if index == 9 else offset + 55
            with pytest.raises(CheckpointError) as caught:
                reader.read(specs["it"], index)
            assert caught.value.message == f"{file}: ended at byte {at}, inside 'it'"


def test_a_file_that_vanished_names_itself_and_the_tensor(tmp_path: Path) -> None:
    specs = saved(tmp_path, {"it": random(torch.int8, 4)})
    specs["it"].file.unlink()
    with TensorReader() as reader, pytest.raises(CheckpointError) as caught:
        reader.read(specs["it"])
    assert caught.value.message.startswith(f"{specs['it'].file}: reading 'it' at byte ")
    assert caught.value.message.endswith("No such file or directory")


def test_reads_that_the_system_cuts_short_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Linux moves at most 2 GiB at a time, network disks less.
    import os

    whole = os.preadv
    calls: list[int] = []

    def a_little(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        return whole(descriptor, [buffers[0][:33]], offset)

    tensors = {"it": random(torch.int8, 100)}
    specs = saved(tmp_path, tensors)
    monkeypatch.setattr(os, "preadv", a_little)
    with TensorReader() as reader:
        assert same_bytes(reader.read(specs["it"]), tensors["it"])
    start = specs["it"].offset
    assert calls == [start, start + 33, start + 66, start + 99]


def test_closing_gives_files_and_memory_back(tmp_path: Path) -> None:
    specs = saved(tmp_path, {"it": random(torch.int8, 100)})
    open_files = Path("/proc/self/fd")
    if not open_files.exists():
        pytest.skip("no /proc: this system does not list a process's files")

    def ours() -> int:
        links = [link for link in open_files.iterdir() if link.is_symlink()]
        return sum(str(tmp_path) in str(link.readlink()) for link in links)

    reader = TensorReader()
    reader.read(specs["it"])
    reader.read(specs["it"])
    assert ours() == 1  # opened once
    reader.close()
    assert ours() == 0
    assert reader._buffer.numel() == 0
    assert same_bytes(reader.read(specs["it"]), random(torch.int8, 100))  # and starts afresh
    reader.close()
