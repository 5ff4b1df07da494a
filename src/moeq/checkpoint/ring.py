"""Bytes of a checkpoint through page-locked buffers to one thread that hands them to a GPU.

    Ring   some buffers, page-locked by a thread of its own: that takes as long as reading them
    feed   reader threads fill buffers, all of them one buffer, then the next; the calling thread
           uses what is full, and a buffer is free again when the GPU has passed its event

One thread talks to the GPU, because threads that do so at once wait for each other in the driver
and for Python's lock: with sixteen of them, the same work took twice as long.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from moeq.checkpoint.files import Files
from moeq.checkpoint.stream import Chunk, Crew

_PART = 16 << 20
"""Bytes that a reader takes at a time."""


class Event(Protocol):
    """`torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether the GPU has passed it."""

    def synchronize(self) -> None:
        """Wait until it has."""


class Ring:
    """Page-locked buffers.

    Args:
        count: of buffers.
        nbytes: of each.
        pin: whether they are page-locked, which needs a GPU.

    Attributes:
        free: a buffer that nobody uses; or the error that taking its memory raised; or None, when
            nobody is to take another.
    """

    def __init__(self, count: int, nbytes: int, *, pin: bool = True) -> None:
        self.free: SimpleQueue[Tensor | BaseException | None] = SimpleQueue()
        args = self.free, count, nbytes, pin
        threading.Thread(target=_fill, args=args, name="moeq-pin", daemon=True).start()


def _fill(
    free: SimpleQueue[Tensor | BaseException | None], count: int, nbytes: int, pin: bool
) -> None:
    try:
        for _ in range(count):
            free.put(torch.empty(nbytes, dtype=torch.uint8, pin_memory=pin))
    except BaseException as error:  # noqa: BLE001  # raised again where the buffer is taken
        free.put(error)


@dataclass
class _Filling:
    """A chunk, its buffer, and how many parts of it are still to be read."""

    chunk: Chunk
    buffer: Tensor
    missing: int


def feed(
    ring: Ring,
    chunks: Sequence[Chunk],
    use: Callable[[Chunk, Tensor], Event],
    *,
    readers: int,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Read every chunk and have it used, in this thread.

    Args:
        ring: whose buffers hold the largest chunk each.
        chunks: in the order in which they are begun; they may come to be used in another.
        use: called with a chunk and the buffer that holds it; returns the event after which the
            buffer may be written again.
        readers: threads.
        on_bytes: called with the bytes of every chunk once it is used.

    Raises:
        CheckpointError: a file could not be read, or changed since its header was.
        BaseException: what `use` raised.
    """
    parts = _parts(chunks, ring)
    taking, counting = threading.Lock(), threading.Lock()
    full: SimpleQueue[_Filling | None] = SimpleQueue()

    def work(files: Files, stop: threading.Event) -> None:
        while not stop.is_set():
            with taking:
                part = next(parts, None)
            if part is None:
                return
            filling, begin, end = part
            filling.chunk.read(files, filling.buffer, begin, end)
            with counting:
                filling.missing -= 1
                is_full = filling.missing == 0
            if is_full and not stop.is_set():
                full.put(filling)

    pending: deque[tuple[Event, Tensor]] = deque()
    try:
        with Crew(work, readers, on_failure=lambda: full.put(None)) as crew:
            try:
                for _ in chunks:
                    while pending and (full.empty() or pending[0][0].query()):
                        event, buffer = pending.popleft()
                        event.synchronize()
                        ring.free.put(buffer)
                    filling = full.get()
                    if filling is None:  # a reader failed
                        break
                    pending.append((use(filling.chunk, filling.buffer), filling.buffer))
                    if on_bytes is not None:
                        on_bytes(filling.chunk.wanted_bytes)
            finally:
                ring.free.put(None)  # where this ends early, readers wait for a buffer
            crew.join()
    finally:
        ring.free.put(None)  # Ctrl-C while the crew began: readers that began wait
        for event, _ in pending:
            event.synchronize()


def _parts(chunks: Sequence[Chunk], ring: Ring) -> Iterator[tuple[_Filling, int, int]]:
    """What is to be read next; waits for a free buffer before the first part of a chunk."""
    for chunk in chunks:
        buffer = ring.free.get()
        if buffer is None:
            return
        if isinstance(buffer, BaseException):
            raise buffer
        nbytes = chunk.buffer_bytes
        starts = range(0, max(nbytes, 1), _PART)
        filling = _Filling(chunk, buffer, len(starts))
        for start in starts:
            yield filling, start, min(start + _PART, nbytes)
