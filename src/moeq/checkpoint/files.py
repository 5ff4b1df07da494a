"""Reading bytes of files that must stay what they were when their headers were read."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

from moeq.checkpoint.headers import FileStamp
from moeq.errors import CheckpointError

_MOST_AT_ONCE = 16 << 20
"""Bytes of one request, so that a stop is seen between two."""

_TRIES = 3
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN}
"""Errors of network disks that may not come again."""


class Files:
    """Open files of one thread. Each must be the one whose header was read, to the end.

    Args:
        stop: ends a read early.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._open: dict[Path, tuple[int, FileStamp]] = {}

    def read(
        self,
        file: Path,
        stamp: FileStamp,
        offset: int,
        window: memoryview,
        name_at: Callable[[int], str],
    ) -> None:
        """Fill `window` with the bytes of a file from `offset` on.

        Args:
            file: to read.
            stamp: it has.
            offset: of the first byte.
            window: as long as what is wanted.
            name_at: the tensor that a byte of the file belongs to, for messages.

        Raises:
            CheckpointError: it cannot be read, is too short, or is another file by now.
        """
        done = 0
        tries = 0
        while done < len(window) and not self._stop.is_set():
            at = offset + done
            try:
                part = window[done : done + _MOST_AT_ONCE]
                count = os.preadv(self._descriptor(file, stamp), [part], at)
            except OSError as error:
                tries += 1
                if error.errno in _PASSING and tries < _TRIES:
                    self._forget(file)
                    self._stop.wait(0.1 * tries)
                    continue
                raise CheckpointError(
                    f"{file}: reading {name_at(at)!r} at byte {at}: {error.strerror}",
                    hint="the disk or network does not deliver; try again, or copy the file",
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{file}: ended at byte {at}, inside {name_at(at)!r}",
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
                raise CheckpointError(
                    f"{file}: removed while it was read", hint="put it back and start again"
                ) from None

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
