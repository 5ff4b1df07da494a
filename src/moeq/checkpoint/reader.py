"""Bytes from a checkpoint, a matrix at a time, into one buffer that is used again and again.

Reads are `pread`s into our own memory and not a mapping: a mapped page that is read is counted
against a container's limit until the kernel feels like dropping it, and on network disks faults
one page at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from moeq.checkpoint.headers import TensorSpec
from moeq.errors import CheckpointError


class TensorReader:
    """Reads tensors, or single matrices of stacked ones. A context manager: it holds files open.

    Args:
        progress: called with the number of bytes after each read.
    """

    def __init__(self, progress: Callable[[int], None] | None = None) -> None:
        self._progress = progress
        self._files: dict[Path, int] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def read(self, spec: TensorSpec, index: int | None = None) -> Tensor:
        """One tensor, or the `index`th slice along its first dimension.

        The result is a view of the reader's buffer: the next read overwrites it.

        Raises:
            CheckpointError: the file ended early or could not be read.
        """
        shape, offset, nbytes = spec.shape, spec.offset, spec.nbytes
        if index is not None:
            assert 0 <= index < shape[0], (index, shape)
            nbytes //= shape[0]
            offset += index * nbytes
            shape = shape[1:]
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # free the old one first
            self._buffer = torch.empty(nbytes, dtype=torch.uint8)
        window = self._buffer[:nbytes]
        self._fill(memoryview(window.numpy().data), spec, offset)
        if self._progress is not None:
            self._progress(nbytes)
        return window.view(spec.dtype).view(shape)

    def close(self) -> None:
        """Close the files and free the buffer."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _fill(self, window: memoryview, spec: TensorSpec, offset: int) -> None:
        done = 0
        try:
            if spec.file not in self._files:
                self._files[spec.file] = os.open(spec.file, os.O_RDONLY)
            while done < len(window):
                count = os.preadv(self._files[spec.file], [window[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{spec.file}: ended at byte {offset + done}, inside {spec.name!r}",
                        hint="the file changed since its header was read",
                    )
                done += count
        except OSError as error:
            raise CheckpointError(
                f"{spec.file}: reading {spec.name!r} at byte {offset + done}: {error.strerror}"
            ) from error
