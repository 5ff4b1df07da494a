"""Bytes from disk, exactly, by several threads, and what stops them."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moeq.checkpoint import stream as streaming
from moeq.checkpoint.headers import DTYPES, TensorSpec, read_headers
from moeq.checkpoint.stream import (
    Chunk,
    Piece,
    chunks_of,
    matrix,
    read_piece,
    rows,
    stream,
    whole,
)
from moeq.errors import CheckpointError


def random(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Random bytes, NaNs of every kind among them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def saved(folder: Path, tensors: dict[str, Tensor], name: str = "model") -> dict[str, TensorSpec]:
    save_file(tensors, folder / f"{name}.safetensors")
    return read_headers([folder / f"{name}.safetensors"])


def same_bytes(found: Tensor, expected: Tensor) -> bool:
    return (found.dtype, found.shape) == (expected.dtype, expected.shape) and torch.equal(
        found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)
    )


class Collect:
    """Keeps copies of what a stream brought, by key."""

    def __init__(self) -> None:
        self.found: dict[Any, Tensor] = {}

    def __call__(self, chunk: Chunk, buffer: Tensor) -> None:
        for piece, span in chunk.spans(buffer):
            assert piece.key not in self.found
            self.found[piece.key] = span.tensor().clone()


def streamed(pieces: list[Piece], limit: int = 1 << 20, workers: int = 3) -> dict[Any, Tensor]:
    collect = Collect()
    stream(chunks_of(pieces, limit), collect, workers=workers)
    return collect.found


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (), (0, 4)])
def test_whole_tensors_are_read_bit_for_bit(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = {"before": random(torch.uint8, 3), "it": random(dtype, *shape, seed=1)}
    specs = saved(tmp_path, tensors)
    found = streamed([whole(spec, name) for name, spec in specs.items()])
    for name, tensor in tensors.items():
        assert same_bytes(found[name], tensor)
        assert same_bytes(read_piece(whole(specs[name], None)), tensor)


@pytest.mark.parametrize("limit", [1, 100, 1 << 20])
@pytest.mark.parametrize("workers", [1, 4])
def test_pieces_of_several_files_are_read_bit_for_bit(
    limit: int, workers: int, tmp_path: Path
) -> None:
    tensors = {f"t{i}": random(torch.bfloat16, 5, 3, 7, seed=i) for i in range(4)}
    specs = saved(tmp_path, dict(list(tensors.items())[:2]), "a")
    specs |= saved(tmp_path, dict(list(tensors.items())[2:]), "b")
    pieces = [matrix(specs[f"t{i}"], (i, e), e) for i in range(3) for e in (4, 0, 1, 2)]
    pieces += [rows(specs["t3"], "rows", 1, 3)]
    found = streamed(pieces, limit, workers)
    assert len(found) == len(pieces)
    for piece in pieces:
        if piece.key == "rows":
            assert same_bytes(found["rows"], tensors["t3"][1:4])
        else:
            i, e = piece.key
            assert same_bytes(found[piece.key], tensors[f"t{i}"][e])


def test_chunks_follow_the_file_and_stay_within_the_limit(tmp_path: Path) -> None:
    specs = saved(tmp_path, {f"t{i}": random(torch.int8, 40) for i in range(10)})
    specs |= saved(tmp_path, {"big": random(torch.int8, 1000)}, "z")
    chunks = chunks_of([whole(spec, name) for name, spec in reversed(specs.items())], 100)
    assert [chunk.nbytes for chunk in chunks] == [80] * 5 + [1000]
    places = [(str(chunk.file), chunk.offset) for chunk in chunks]
    assert places == sorted(places)


def test_far_away_pieces_are_not_read_together(tmp_path: Path) -> None:
    specs = saved(tmp_path, {"stacked": random(torch.int8, 3, 1 << 17)})
    pieces = [matrix(specs["stacked"], i, i) for i in (0, 2)]
    assert [chunk.nbytes for chunk in chunks_of(pieces)] == [1 << 17] * 2


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    specs = saved(tmp_path, {"a": random(torch.float32, 4, 5), "b": random(torch.int8, 3)})
    seen: list[int] = []
    pieces = [whole(spec, name) for name, spec in specs.items()]
    stream(chunks_of(pieces, 1), Collect(), workers=2, on_bytes=seen.append)
    assert sorted(seen) == [3, 80]


def test_buffers_are_no_more_than_workers(tmp_path: Path) -> None:
    specs = saved(tmp_path, {"it": random(torch.int8, 50, 1000)})
    seen: set[tuple[int, int]] = set()

    def use(chunk: Chunk, buffer: Tensor) -> None:
        seen.add((buffer.data_ptr(), buffer.numel()))

    stream(chunks_of([matrix(specs["it"], i, i) for i in range(50)], 1000), use, workers=2)
    assert len(seen) <= 2
    assert {size for _, size in seen} == {1000}


def test_a_file_that_became_shorter_names_itself_and_the_tensor(tmp_path: Path) -> None:
    specs = saved(tmp_path, {"it": random(torch.int8, 10, 10)})
    spec = specs["it"]
    with open(spec.file, "r+b") as handle:
        handle.truncate(spec.offset + 55)
    with pytest.raises(CheckpointError, match="changed since its header was read"):
        streamed([whole(spec, None)])


def test_a_file_that_vanished_names_itself_and_the_tensor(tmp_path: Path) -> None:
    specs = saved(tmp_path, {"it": random(torch.int8, 4)})
    specs["it"].file.unlink()
    with pytest.raises(CheckpointError) as caught:
        streamed([whole(specs["it"], None)])
    assert caught.value.message.startswith(f"{specs['it'].file}: reading 'it' at byte ")
    assert caught.value.message.endswith("No such file or directory")


def test_a_file_that_is_replaced_while_it_is_read_is_found_out(tmp_path: Path) -> None:
    specs = saved(tmp_path, {"it": random(torch.int8, 4, 10)})

    def use(chunk: Chunk, buffer: Tensor) -> None:
        save_file({"it": random(torch.int8, 4, 10, seed=2)}, tmp_path / "other.safetensors")
        (tmp_path / "other.safetensors").replace(specs["it"].file)

    with pytest.raises(CheckpointError, match="changed since its header was read"):
        stream(chunks_of([whole(specs["it"], None)]), use, workers=1)


def test_reads_that_the_system_cuts_short_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Linux moves at most 2 GiB at a time, network disks less.
    whole_read = os.preadv

    def a_little(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return whole_read(descriptor, [buffers[0][:33]], offset)

    tensors = {"it": random(torch.int8, 100)}
    specs = saved(tmp_path, tensors)
    monkeypatch.setattr(os, "preadv", a_little)
    assert same_bytes(streamed([whole(specs["it"], 0)])[0], tensors["it"])


@pytest.mark.parametrize(("times", "ends_well"), [(2, True), (3, False)])
def test_errors_that_pass_are_tried_again(
    times: int, ends_well: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_read = os.preadv
    left = [times]

    def at_first_not(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return whole_read(descriptor, buffers, offset)

    tensors = {"it": random(torch.int8, 100)}
    specs = saved(tmp_path, tensors)
    monkeypatch.setattr(os, "preadv", at_first_not)
    if ends_well:
        assert same_bytes(streamed([whole(specs["it"], 0)])[0], tensors["it"])
    else:
        with pytest.raises(CheckpointError, match="Stale file handle"):
            streamed([whole(specs["it"], 0)])


def test_the_first_error_ends_all_workers(tmp_path: Path) -> None:
    specs = saved(tmp_path, {"it": random(torch.int8, 1000, 10)})
    used = []

    def use(chunk: Chunk, buffer: Tensor) -> None:
        used.append(chunk)
        if len(used) == 5:
            raise ValueError("not these bytes")
        time.sleep(0.001)

    pieces = [matrix(specs["it"], i, i) for i in range(1000)]
    with pytest.raises(ValueError, match="not these bytes"):
        stream(chunks_of(pieces, 10), use, workers=4)
    assert len(used) < 20
    assert not [t for t in threading.enumerate() if t.name == "moeq-read"]


def test_an_interrupt_ends_all_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = saved(tmp_path, {"it": random(torch.int8, 1000, 10)})
    used = []
    pieces = [matrix(specs["it"], i, i) for i in range(1000)]

    def use(chunk: Chunk, buffer: Tensor) -> None:
        used.append(chunk)
        time.sleep(0.01)

    join = threading.Thread.join
    calls = []

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        join(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream(chunks_of(pieces, 10), use, workers=2)
    assert 0 < len(used) < 1000
    assert not [t for t in threading.enumerate() if t.name == "moeq-read"]


def test_files_are_closed(tmp_path: Path) -> None:
    open_files = Path("/proc/self/fd")
    if not open_files.exists():
        pytest.skip("no /proc: this system does not list a process's files")
    specs = saved(tmp_path, {"it": random(torch.int8, 100)})
    streamed([whole(specs["it"], None)])
    links = [link for link in open_files.iterdir() if link.is_symlink()]
    assert not [link for link in links if str(tmp_path) in str(link.readlink())]


def test_operators_have_as_many_threads_afterwards(tmp_path: Path) -> None:
    specs = saved(tmp_path, {"it": random(torch.int8, 100)})
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inside: list[int] = []
        stream(
            chunks_of([whole(specs["it"], None)]),
            lambda chunk, buffer: inside.append(torch.get_num_threads()),
            workers=1,
        )
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (inside, later, torch.get_num_threads()) == ([1], [3], 3)
    finally:
        torch.set_num_threads(before)


def test_nothing_to_read_is_no_error() -> None:
    stream([], Collect(), workers=4)
    assert streaming.chunks_of([]) == []
