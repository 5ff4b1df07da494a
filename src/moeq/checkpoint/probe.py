"""How fast a checkpoint can be read here, found out in a second."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_BLOCK = 8 << 20
_THREADS = 8


def read_rate(files: Iterable[Path], seconds: float = 1.0) -> float:
    """Bytes per second that several threads read from files, from different places.

    The system is asked to drop what it has cached of those places first; where it does not (a file
    that is being written, a network disk), this is the rate of its cache.
    """
    places = [
        (file, offset)
        for file in files
        for offset in range(0, max(1, file.stat().st_size - _BLOCK), 4 * _BLOCK)
    ]
    started = time.perf_counter()
    lock = threading.Lock()
    read = 0

    def work(mine: list[tuple[Path, int]]) -> None:
        nonlocal read
        buffer = bytearray(_BLOCK)
        for file, offset in mine:
            if time.perf_counter() - started > seconds:
                return
            descriptor = os.open(file, os.O_RDONLY)
            try:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor, offset, _BLOCK, os.POSIX_FADV_DONTNEED)
                count = os.preadv(descriptor, [buffer], offset)
            finally:
                os.close(descriptor)
            with lock:
                read += count

    with ThreadPoolExecutor(_THREADS) as pool:
        for future in [pool.submit(work, places[i::_THREADS]) for i in range(_THREADS)]:
            future.result()
    return read / (time.perf_counter() - started)
