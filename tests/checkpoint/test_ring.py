"""Bytes from disk to one thread, through buffers that somebody else still reads from."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeq.checkpoint import ring as ringing
from moeq.checkpoint.headers import TensorSpec
from moeq.checkpoint.ring import Ring, feed
from moeq.checkpoint.stream import Chunk, Piece, chunks_of, matrix, whole
from moeq.errors import CheckpointError
from tests.checkpoint.test_stream import random, same_bytes, saved


class LaterCopy:
    """A copy that a GPU makes some time after it was told to."""

    def __init__(self, chunk: Chunk, buffer: Tensor, found: dict[Any, Tensor]) -> None:
        self.chunk, self.buffer, self.found = chunk, buffer, found
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        if self.asked < 3:
            return False
        self.synchronize()
        return True

    def synchronize(self) -> None:
        for piece, span in self.chunk.spans(self.buffer):
            self.found[piece.key] = span.tensor().clone()


def fed(
    pieces: list[Piece], limit: int, *, buffers: int = 2, readers: int = 3
) -> tuple[dict[Any, Tensor], list[int]]:
    chunks = chunks_of(pieces, limit)
    ring = Ring(buffers, max(chunk.nbytes for chunk in chunks), pin=False)
    found: dict[Any, Tensor] = {}
    seen: list[int] = []

    def use(chunk: Chunk, buffer: Tensor) -> LaterCopy:
        assert threading.current_thread() is threading.main_thread()
        return LaterCopy(chunk, buffer, found)

    feed(ring, chunks, use, readers=readers, on_bytes=seen.append)
    return found, seen


def readers_left() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "moeq-read"]


@pytest.fixture
def stacked(tmp_path: Path) -> tuple[TensorSpec, Tensor]:
    tensor = random(torch.int8, 100, 50)
    return saved(tmp_path, {"it": tensor})["it"], tensor


@pytest.mark.parametrize("limit", [1, 170, 1 << 20])
@pytest.mark.parametrize("part", [7, 1 << 20])
@pytest.mark.parametrize(("buffers", "readers"), [(1, 1), (1, 5), (3, 4)])
def test_every_byte_arrives_before_its_buffer_is_written_again(
    limit: int,
    part: int,
    buffers: int,
    readers: int,
    stacked: tuple[TensorSpec, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ringing, "_PART", part)
    spec, tensor = stacked
    pieces = [matrix(spec, i, i) for i in range(100)]
    found, seen = fed(pieces, limit, buffers=buffers, readers=readers)
    assert sum(seen) == tensor.nbytes
    for index, row in enumerate(tensor):
        assert same_bytes(found[index], row)
    assert not readers_left()


def test_a_tensor_without_elements(tmp_path: Path) -> None:
    specs = saved(tmp_path, {"none": random(torch.int8, 0, 4), "some": random(torch.int8, 3)})
    found, _ = fed([whole(spec, name) for name, spec in specs.items()], 1)
    assert found["none"].shape == (0, 4)


def test_a_failing_read_wakes_who_waits(stacked: tuple[TensorSpec, Tensor]) -> None:
    spec, _ = stacked
    with open(spec.file, "r+b") as handle:
        handle.truncate(spec.offset + 1000)
    with pytest.raises(CheckpointError, match="changed since its header was read"):
        fed([matrix(spec, i, i) for i in range(100)], 10, buffers=1, readers=4)
    assert not readers_left()


def test_an_error_of_the_user_ends_the_readers(stacked: tuple[TensorSpec, Tensor]) -> None:
    spec, _ = stacked
    chunks = chunks_of([matrix(spec, i, i) for i in range(100)], 10)
    used = []

    def use(chunk: Chunk, buffer: Tensor) -> LaterCopy:
        used.append(chunk)
        if len(used) == 3:
            raise KeyboardInterrupt
        return LaterCopy(chunk, buffer, {})

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        feed(Ring(2, 50, pin=False), chunks, use, readers=4)
    assert not readers_left()
    assert time.monotonic() - started < 30
    assert len(used) == 3


def test_no_memory_for_buffers_is_an_error(
    stacked: tuple[TensorSpec, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _ = stacked
    real = torch.empty

    def refuse(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        if threading.current_thread().name == "moeq-pin":
            raise RuntimeError("no more pages to lock")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(RuntimeError, match="no more pages to lock"):
        fed([matrix(spec, i, i) for i in range(100)], 10)
    assert not readers_left()


def test_an_interrupt_while_readers_begin_ends_them(
    stacked: tuple[TensorSpec, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _ = stacked
    chunks = chunks_of([matrix(spec, i, i) for i in range(100)], 10)
    real, started = threading.Thread.start, []

    def start(self: threading.Thread) -> None:
        if self.name == "moeq-read":
            if len(started) == 2:
                raise KeyboardInterrupt
            started.append(self)
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        feed(Ring(1, 50, pin=False), chunks, lambda *_: pytest.fail("used"), readers=4)
    for thread in started:
        thread.join(30)
    assert not readers_left()
