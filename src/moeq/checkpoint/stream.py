"""Bytes of a checkpoint in file order, by several threads, in a bounded amount of memory.

    pieces   what is wanted: a tensor, one matrix of a stacked one, or some rows
    chunks   pieces that lie side by side in a file, read at once
    stream   each worker takes the next chunk, reads it into its own buffer and uses it there

Reads are `pread`s into our own memory and not a mapping: a mapped page that is read is counted
against a container's limit until the kernel feels like dropping it, and on network disks faults one
page at a time. Memory is workers x (the largest chunk), whatever the size of the checkpoint.
"""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeq.checkpoint.headers import FileStamp, TensorSpec
from moeq.errors import CheckpointError

CHUNK_BYTES = 16 << 20
"""Read at once: disks and page caches are at full speed from a few MiB on, and smaller chunks
spread better over workers."""

_GAP = 1 << 16
"""Bytes that nobody wants and that are read anyway, to save a request."""

_TRIES = 3
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN}
"""Errors of network disks that may not come again."""


@dataclass(frozen=True)
class Piece:
    """Bytes of one tensor that are used together.

    Attributes:
        spec: the tensor.
        key: what the user of the stream knows the piece by.
        begin: of its first byte, from the tensor's first.
        shape: as which it is seen.
    """

    spec: TensorSpec
    key: Any
    begin: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.spec.dtype.itemsize

    @property
    def offset(self) -> int:
        """From the start of the file."""
        return self.spec.offset + self.begin


def whole(spec: TensorSpec, key: Any) -> Piece:
    """A tensor."""
    return Piece(spec, key, 0, spec.shape)


def rows(spec: TensorSpec, key: Any, first: int, count: int) -> Piece:
    """`count` entries along a tensor's first dimension."""
    row = spec.nbytes // spec.shape[0]
    return Piece(spec, key, first * row, (count, *spec.shape[1:]))


def matrix(spec: TensorSpec, key: Any, index: int) -> Piece:
    """The `index`th entry along a tensor's first dimension, without that dimension."""
    piece = rows(spec, key, index, 1)
    return Piece(spec, key, piece.begin, spec.shape[1:])


@dataclass(frozen=True)
class Chunk:
    """Consecutive bytes of one file, and the pieces in them."""

    file: Path
    offset: int
    nbytes: int
    pieces: tuple[Piece, ...]

    def views(self, buffer: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        """Every piece as a tensor over `buffer` uint8 [>= nbytes], which holds the chunk."""
        for piece in self.pieces:
            start = piece.offset - self.offset
            flat = buffer[start : start + piece.nbytes]
            if start % piece.spec.dtype.itemsize:  # only where a file packs types of other sizes
                flat = flat.clone()
            yield piece, flat.view(piece.spec.dtype).view(piece.shape)


def chunks_of(pieces: Iterable[Piece], limit: int = CHUNK_BYTES) -> list[Chunk]:
    """Pieces as chunks in file order, of at most `limit` bytes unless one piece alone has more."""
    chunks: list[Chunk] = []
    taken: list[Piece] = []
    end = 0

    def close() -> None:
        if taken:
            first = taken[0].offset
            chunks.append(Chunk(taken[0].spec.file, first, end - first, tuple(taken)))
            taken.clear()

    for piece in sorted(pieces, key=lambda p: (str(p.spec.file), p.offset)):
        joins = (
            bool(taken)
            and piece.spec.file == taken[0].spec.file
            and piece.offset - end <= _GAP
            and piece.offset + piece.nbytes - taken[0].offset <= limit
        )
        if not joins:
            close()
            end = piece.offset
        taken.append(piece)
        end = max(end, piece.offset + piece.nbytes)
    close()
    return chunks


Use = Callable[[Chunk, Tensor], Callable[[], None] | None]
"""Called in a worker with a chunk and a uint8 buffer that holds it. Where work goes on after it
returns, it returns what to call before the buffer is written again."""


def stream(
    chunks: Sequence[Chunk],
    use: Use,
    *,
    workers: int,
    pin: bool = False,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Read every chunk and have it used, by `workers` threads.

    Args:
        chunks: in the order in which they are begun.
        use: see `Use`. Runs in several threads at once.
        workers: threads; each holds a buffer, or two where `use` goes on.
        pin: buffers are page-locked, for copies to a GPU.
        on_bytes: called with the bytes of every chunk once it is used, one call at a time.

    Raises:
        CheckpointError: a file could not be read, or changed since its header was.
        BaseException: the first that `use` raised. The others end before their next read.
    """
    todo = iter(chunks)
    lock = threading.Lock()
    stop = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        torch.set_num_threads(1)  # per thread; operators of some microseconds gain nothing by more
        files = _Files(stop)
        buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        pending: list[Callable[[], None] | None] = [None, None]
        turn = 0
        try:
            while not stop.is_set():
                with lock:
                    chunk = next(todo, None)
                if chunk is None:
                    break
                if (wait := pending[turn]) is not None:
                    wait()
                if buffers[turn].numel() < chunk.nbytes:
                    buffers[turn] = torch.empty(0, dtype=torch.uint8)  # free the old one first
                    buffers[turn] = torch.empty(chunk.nbytes, dtype=torch.uint8, pin_memory=pin)
                files.read(chunk, buffers[turn])
                if stop.is_set():
                    break
                pending[turn] = use(chunk, buffers[turn])
                if pending[turn] is not None:
                    turn = 1 - turn
                if on_bytes is not None:
                    with lock:
                        on_bytes(sum(piece.nbytes for piece in chunk.pieces))
            for wait in pending:
                if wait is not None:
                    wait()
            files.check()
        except BaseException as error:  # noqa: BLE001  # raised again by the main thread
            failed.append(error)
            stop.set()
        finally:
            files.close()

    operator_threads = torch.get_num_threads()
    count = max(1, min(workers, len(chunks)))
    threads = [threading.Thread(target=work, name="moeq-read", daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)  # so that Ctrl-C is seen
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join(1.5)
        torch.set_num_threads(operator_threads)  # threads to come would start with the workers' one
    if failed:
        raise failed[0]


def read_piece(piece: Piece) -> Tensor:
    """One piece by itself, in memory of its own."""
    chunk = Chunk(piece.spec.file, piece.offset, piece.nbytes, (piece,))
    buffer = torch.empty(piece.nbytes, dtype=torch.uint8)
    files = _Files(threading.Event())
    try:
        files.read(chunk, buffer)
    finally:
        files.close()
    ((_, view),) = chunk.views(buffer)
    return view


class _Files:
    """A worker's open files. Each must be the one whose header was read, to the end."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._open: dict[Path, tuple[int, FileStamp]] = {}

    def read(self, chunk: Chunk, buffer: Tensor) -> None:
        window = memoryview(buffer.numpy().data)[: chunk.nbytes]
        stamp = chunk.pieces[0].spec.stamp
        done = 0
        tries = 0
        while done < len(window) and not self._stop.is_set():
            part = window[done : done + CHUNK_BYTES]
            try:
                count = os.preadv(self._descriptor(chunk.file, stamp), [part], chunk.offset + done)
            except OSError as error:
                tries += 1
                if error.errno in _PASSING and tries < _TRIES:
                    self._forget(chunk.file)
                    self._stop.wait(0.1 * tries)
                    continue
                at = chunk.offset + done
                raise CheckpointError(
                    f"{chunk.file}: reading {_at(chunk, at)!r} at byte {at}: {error.strerror}"
                ) from error
            if count == 0:
                at = chunk.offset + done
                raise CheckpointError(
                    f"{chunk.file}: ended at byte {at}, inside {_at(chunk, at)!r}",
                    hint="the file changed since its header was read",
                )
            done += count

    def check(self) -> None:
        """That no file changed while it was read."""
        for file, (descriptor, stamp) in self._open.items():
            _compare(file, stamp, os.fstat(descriptor))
            try:
                _compare(file, stamp, os.stat(file))
            except FileNotFoundError:
                raise CheckpointError(f"{file}: removed while it was read") from None

    def close(self) -> None:
        for file in list(self._open):
            self._forget(file)

    def _descriptor(self, file: Path, stamp: FileStamp) -> int:
        if file not in self._open:
            descriptor = os.open(file, os.O_RDONLY)
            self._open[file] = descriptor, stamp
            _compare(file, stamp, os.fstat(descriptor))
        return self._open[file][0]

    def _forget(self, file: Path) -> None:
        if file in self._open:
            os.close(self._open.pop(file)[0])


def _compare(file: Path, stamp: FileStamp, found: os.stat_result) -> None:
    if FileStamp.of(found) != stamp:
        raise CheckpointError(
            f"{file}: changed since its header was read",
            hint="something writes to the checkpoint; start again when it is done",
        )


def _at(chunk: Chunk, offset: int) -> str:
    """The tensor that holds a byte of the file."""
    for piece in chunk.pieces:
        if offset < piece.offset + piece.nbytes:
            return piece.spec.name
    return chunk.pieces[-1].spec.name
