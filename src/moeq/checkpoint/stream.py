"""Bytes of a checkpoint in file order, by several threads, in a bounded amount of memory.

    pieces   what is wanted: a tensor, one matrix of a stacked one, or some rows
    chunks   pieces that lie side by side in a file, read at once
    stream   each worker takes the next chunk, reads it into its own buffer and uses it there

Reads are `pread`s into our own memory and not a mapping: a mapped page that is read is counted
against a container's limit until the kernel feels like dropping it, and on network disks faults one
page at a time. Memory is workers x (the largest chunk), whatever the size of the checkpoint.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeq.checkpoint.files import Files
from moeq.checkpoint.headers import FileStamp, TensorSpec
from moeq.span import Span

CHUNK_BYTES = 16 << 20
"""Read at once: disks and page caches are at full speed from a few MiB on, and smaller chunks
spread better over workers."""

_GAP = 1 << 16
"""Bytes that nobody wants and that are read anyway, to save a request."""


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

    @property
    def stamp(self) -> FileStamp:
        """Of the file when its header was read."""
        return self.pieces[0].spec.stamp

    @property
    def wanted_bytes(self) -> int:
        """Without the gaps between pieces."""
        return sum(piece.nbytes for piece in self.pieces)

    def name_at(self, offset: int) -> str:
        """The tensor that holds a byte of the file."""
        for piece in self.pieces:
            if offset < piece.offset + piece.nbytes:
                return piece.spec.name
        return self.pieces[-1].spec.name

    def read(self, files: Files, buffer: Tensor, begin: int, end: int) -> None:
        """Bytes begin..end of the chunk into the same place of `buffer` uint8 [>= nbytes]."""
        window = memoryview(buffer.numpy().data)[begin:end]
        files.read(self.file, self.stamp, self.offset + begin, window, self.name_at)

    def spans(self, buffer: Tensor) -> Iterator[tuple[Piece, Span]]:
        """Every piece in `buffer` uint8 [>= nbytes], which holds the chunk."""
        typed: dict[torch.dtype, Tensor] = {}
        for piece in self.pieces:
            dtype, start = piece.spec.dtype, piece.offset - self.offset
            if start % dtype.itemsize:  # only where a file packs types of other sizes
                copy = buffer[start : start + piece.nbytes].clone()
                yield piece, Span(copy.view(dtype), 0, piece.shape)
                continue
            if dtype not in typed:
                usable = len(buffer) // dtype.itemsize * dtype.itemsize
                typed[dtype] = buffer[:usable].view(dtype)
            yield piece, Span(typed[dtype], start // dtype.itemsize, piece.shape)


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


def stream(
    chunks: Sequence[Chunk],
    use: Callable[[Chunk, Tensor], None],
    *,
    workers: int,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Read every chunk and have it used, by `workers` threads.

    Args:
        chunks: in the order in which they are begun.
        use: called in a worker with a chunk and a uint8 buffer that holds it; in several at once.
        workers: threads; each holds a buffer.
        on_bytes: called with the bytes of every chunk once it is used, one call at a time.

    Raises:
        CheckpointError: a file could not be read, or changed since its header was.
        BaseException: the first that `use` raised. The others end before their next read.
    """
    todo = iter(chunks)
    lock = threading.Lock()

    def work(files: Files, stop: threading.Event) -> None:
        buffer = torch.empty(0, dtype=torch.uint8)
        while not stop.is_set():
            with lock:
                chunk = next(todo, None)
            if chunk is None:
                return
            if buffer.numel() < chunk.nbytes:
                buffer = torch.empty(0, dtype=torch.uint8)  # free the old one first
                buffer = torch.empty(chunk.nbytes, dtype=torch.uint8)
            chunk.read(files, buffer, 0, chunk.nbytes)
            if stop.is_set():
                return
            use(chunk, buffer)
            if on_bytes is not None:
                with lock:
                    on_bytes(chunk.wanted_bytes)

    with Crew(work, min(workers, len(chunks))) as crew:
        crew.join()


class Crew:
    """Threads that read. Inside the block they work; at its end they are gone.

    Args:
        work: what each does, until it is done or the event is set.
        count: threads.
        on_failure: called in a thread that failed, to wake who waits.
    """

    def __init__(
        self,
        work: Callable[[Files, threading.Event], None],
        count: int,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self._work = work
        self._on_failure = on_failure
        self._stop = threading.Event()
        self._failed: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, name="moeq-read", daemon=True)
            for _ in range(max(1, count))
        ]

    def __enter__(self) -> Crew:
        self._operator_threads = torch.get_num_threads()
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # no thread to be had, or Ctrl-C: nobody else ends those there are
            self._stop.set()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(1.5)
        # Threads to come would start with the workers' one
        torch.set_num_threads(self._operator_threads)

    def join(self) -> None:
        """Wait for all.

        Raises:
            BaseException: what the first that failed raised.
        """
        for thread in self._threads:
            while thread.is_alive():
                thread.join(0.1)  # so that Ctrl-C is seen
        self.check()

    def check(self) -> None:
        """Raises what the first that failed raised."""
        if self._failed:
            raise self._failed[0]

    def _run(self) -> None:
        torch.set_num_threads(1)  # per thread; operators of some microseconds gain nothing by more
        files = Files(self._stop)
        try:
            self._work(files, self._stop)
            files.check()
        except BaseException as error:  # noqa: BLE001  # raised again by the main thread
            self._failed.append(error)
            self._stop.set()
            if self._on_failure is not None:
                self._on_failure()
        finally:
            files.close()


def read_piece(piece: Piece) -> Tensor:
    """One piece by itself, in memory of its own."""
    chunk = Chunk(piece.spec.file, piece.offset, piece.nbytes, (piece,))
    buffer = torch.empty(piece.nbytes, dtype=torch.uint8)
    files = Files(threading.Event())
    try:
        chunk.read(files, buffer, 0, chunk.nbytes)
    finally:
        files.close()
    ((_, span),) = chunk.spans(buffer)
    return span.tensor()
