"""Bytes of a checkpoint in file order, by several threads, in a bounded amount of memory.

    pieces   what is wanted: a tensor, one matrix of a stacked one, or some rows
    chunks   pieces that lie side by side in a file, read at once
    stream   each worker takes the next chunk, reads it into its own buffer and uses it there

Where a tensor is stored as codes and scales, pieces are of the codes; their scales are read behind
the chunk, and the user of a chunk gets decoded copies.

Reads are `pread`s into our own memory and not a mapping: a mapped page that is read is counted
against a container's limit until the kernel feels like dropping it, and on network disks faults one
page at a time. Memory is workers x (the largest chunk), whatever the size of the checkpoint.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeq.checkpoint.encodings import EncodedSpec, check_scales
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
        shape: as which it is seen; with matrices as they are stored.
    """

    spec: TensorSpec
    key: Any
    begin: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """In the file; scales not counted."""
        if isinstance(self.spec, EncodedSpec):
            # A product first: an fp4 code is half a byte
            return math.prod(self.shape) * self.spec.data_bytes // math.prod(self.spec.shape)
        return self.held_bytes

    @property
    def held_bytes(self) -> int:
        """As a tensor."""
        return math.prod(self.shape) * self.spec.dtype.itemsize

    @property
    def offset(self) -> int:
        """From the start of the file."""
        return self.spec.offset + self.begin

    @property
    def scales(self) -> tuple[int, int]:
        """(first byte from that of the tensor's scales, bytes) of the piece's own."""
        if not isinstance(self.spec, EncodedSpec):
            return 0, 0
        return self.spec.encoding.scales_of(self.spec, self.begin, self.shape)


def whole(spec: TensorSpec, key: Any) -> Piece:
    """A tensor."""
    return Piece(spec, key, 0, spec.stored_shape)


def rows(spec: TensorSpec, key: Any, first: int, count: int) -> Piece:
    """`count` entries along a tensor's first dimension."""
    shape = spec.stored_shape
    row = spec.data_bytes // shape[0]
    return Piece(spec, key, first * row, (count, *shape[1:]))


def matrix(spec: TensorSpec, key: Any, index: int) -> Piece:
    """The `index`th entry along a tensor's first dimension, without that dimension."""
    piece = rows(spec, key, index, 1)
    return Piece(spec, key, piece.begin, piece.shape[1:])


_ALIGNED = 16
"""Bytes at whose multiples scales begin in a buffer, so that they can be seen in their dtype."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive bytes of one file, the pieces in them, and the scales of these.

    Attributes:
        file: that holds the pieces; scales can be in another.
        offset: of the first byte.
        nbytes: that are consecutive.
        pieces: in order.
        scales: by the index of a piece, where in a buffer its scales begin.
        buffer_bytes: of all together.
        decoded_bytes: of the copies that `spans` makes.
    """

    file: Path
    offset: int
    nbytes: int
    pieces: tuple[Piece, ...]
    scales: dict[int, int]
    buffer_bytes: int
    decoded_bytes: int

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Chunk:
        """Pieces of one file, in order."""
        first = pieces[0]
        nbytes = end = max(piece.offset + piece.nbytes for piece in pieces) - first.offset
        scales, decoded = {}, 0
        for index, piece in enumerate(pieces):
            if isinstance(piece.spec, EncodedSpec):
                scales[index] = begin = math.ceil(end / _ALIGNED) * _ALIGNED
                end = begin + piece.scales[1]
                decoded += piece.held_bytes
        return cls(first.spec.file, first.offset, nbytes, tuple(pieces), scales, end, decoded)

    @property
    def stamp(self) -> FileStamp:
        """Of the file when its header was read."""
        return self.pieces[0].spec.stamp

    @property
    def wanted_bytes(self) -> int:
        """Without the gaps between pieces."""
        return sum(piece.nbytes + piece.scales[1] for piece in self.pieces)

    def name_at(self, offset: int) -> str:
        """The tensor that holds a byte of the file."""
        for piece in self.pieces:
            if offset < piece.offset + piece.nbytes:
                return piece.spec.keys[0]
        return self.pieces[-1].spec.keys[0]

    def read(self, files: Files, buffer: Tensor, begin: int, end: int) -> None:
        """Bytes begin..end of a buffer uint8 [>= buffer_bytes]; both multiples of `_ALIGNED`, or an
        end.

        Raises:
            CheckpointError: see `Files.read`.
            NonFiniteError: a scale is not a number.
        """
        memory = memoryview(buffer.numpy().data)
        if begin < self.nbytes:
            window = memory[begin : min(end, self.nbytes)]
            files.read(self.file, self.stamp, self.offset + begin, window, self.name_at)
        for index, start in self.scales.items():
            piece = self.pieces[index]
            first, count = piece.scales
            low, high = max(begin, start), min(end, start + count)
            if low >= high:
                continue
            spec, at = piece.spec, first + low - start
            assert isinstance(spec, EncodedSpec)
            scales, window = spec.scales, memory[low:high]
            name_at = functools.partial(_named, scales.name)
            files.read(scales.file, scales.stamp, scales.offset + at, window, name_at)
            check_scales(spec, at, window)

    def spans(self, buffer: Tensor) -> Iterator[tuple[Piece, Span]]:
        """Every piece in `buffer` uint8 [>= buffer_bytes], which holds the chunk."""
        typed: dict[torch.dtype, Tensor] = {}
        for index, piece in enumerate(self.pieces):
            dtype, start = piece.spec.dtype, piece.offset - self.offset
            if isinstance(piece.spec, EncodedSpec):
                codes = buffer[start : start + piece.nbytes]
                at = self.scales[index]
                scales = buffer[at : at + piece.scales[1]]
                decoded = torch.empty(piece.shape, dtype=dtype, device=buffer.device)
                piece.spec.encoding.decode(codes, scales, decoded, piece.begin)
                yield piece, Span.of(decoded)
                continue
            if start % dtype.itemsize:  # only where a file packs types of other sizes
                copy = buffer[start : start + piece.nbytes].clone()
                yield piece, Span(copy.view(dtype), 0, piece.shape)
                continue
            if dtype not in typed:
                usable = len(buffer) // dtype.itemsize * dtype.itemsize
                typed[dtype] = buffer[:usable].view(dtype)
            yield piece, Span(typed[dtype], start // dtype.itemsize, piece.shape)


def _named(name: str, offset: int) -> str:
    return name


def chunks_of(pieces: Iterable[Piece], limit: int = CHUNK_BYTES) -> list[Chunk]:
    """Pieces as chunks in file order, of at most `limit` bytes, and of as many decoded, unless one
    piece alone has more."""
    chunks: list[Chunk] = []
    taken: list[Piece] = []
    end = decoded = 0

    def close() -> None:
        if taken:
            chunks.append(Chunk.of(taken))
            taken.clear()

    for piece in sorted(pieces, key=lambda p: (str(p.spec.file), p.offset)):
        joins = (
            bool(taken)
            and piece.spec.file == taken[0].spec.file
            and piece.offset - end <= _GAP
            and piece.offset + piece.nbytes - taken[0].offset <= limit
            and decoded + piece.held_bytes <= limit
        )
        if not joins:
            close()
            end, decoded = piece.offset, 0
        taken.append(piece)
        end = max(end, piece.offset + piece.nbytes)
        decoded += piece.held_bytes
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
            if buffer.numel() < chunk.buffer_bytes:
                buffer = torch.empty(0, dtype=torch.uint8)  # free the old one first
                buffer = torch.empty(chunk.buffer_bytes, dtype=torch.uint8)
            chunk.read(files, buffer, 0, chunk.buffer_bytes)
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
    chunk = Chunk.of([piece])
    buffer = torch.empty(chunk.buffer_bytes, dtype=torch.uint8)
    files = Files(threading.Event())
    try:
        chunk.read(files, buffer, 0, chunk.buffer_bytes)
    finally:
        files.close()
    ((_, span),) = chunk.spans(buffer)
    return span.tensor()
