"""How much memory there is, and how much a load takes."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch

_SAMPLE_EVERY_SECONDS = 0.005

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Memory that this process may still take: what the host has, or what is left of the limit of
    its container, whichever is less."""
    found = [_host_bytes()]
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit = int((_CGROUP / limit_file).read_text())  # "max" where there is none
            usage = int((_CGROUP / usage_file).read_text())
        except (OSError, ValueError):
            continue
        found.append(max(0, limit - usage))
    return min(found)


def _host_bytes() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Python's collector of cycles looks at every object each time some thousand were made; what is
    made for the tensors of a checkpoint are no cycles, and it took a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class PeakMemory:
    """Samples the process's anonymous memory while it is entered; or, where the weights go to a
    CUDA device, reads the most that PyTorch had allocated there.

    Anonymous pages are what a process cannot give back; mapped files are left out. Read from
    /proc, so `peak_bytes` stays None where there is none (macOS). A load that fails need not leave
    it: the sampling thread ends when nobody holds the object any more.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.peak_bytes: int | None = None
        on_gpu = device is not None and device.type == "cuda" and torch.cuda.is_available()
        self._device = device if on_gpu else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True)
        self._start_bytes = anonymous_bytes()
        self._highest = self._start_bytes or 0

    def __enter__(self) -> PeakMemory:
        if self._device is not None:
            # Before the first use of CUDA there are no statistics to reset
            torch.cuda.init()  # type: ignore[no-untyped-call]
            torch.cuda.reset_peak_memory_stats(self._device)
            self._allocated = torch.cuda.memory_allocated(self._device)
        elif self._start_bytes is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._device is not None:
            peak = torch.cuda.max_memory_allocated(self._device)
            self.peak_bytes = peak - self._allocated
        elif self._start_bytes is not None:
            self._thread.join()
            self.sample()
            self.peak_bytes = self._highest - self._start_bytes

    def sample(self) -> bool:
        """Look once; False once it has been left."""
        self._highest = max(self._highest, anonymous_bytes() or 0)
        return not self._stop.is_set()


def _watch(memory: weakref.ref[PeakMemory]) -> None:
    while (watched := memory()) is not None and watched.sample():
        del watched
        time.sleep(_SAMPLE_EVERY_SECONDS)


class Timeline:
    """Memory over time while it is entered: anonymous, or PyTorch's on a CUDA device.

    Attributes:
        samples: (seconds since it was entered, bytes beyond what there was then); none where the
            system does not say. Some hundreds, however long it takes.
    """

    _MOST = 400

    def __init__(self, device: torch.device) -> None:
        self.samples: list[tuple[float, int]] = []
        self._device = device if device.type == "cuda" else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Timeline:
        self._first, self._started = self._bytes(), time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _bytes(self) -> int | None:
        if self._device is not None:
            return torch.cuda.memory_allocated(self._device)
        return anonymous_bytes()

    def _sample(self) -> None:
        now = self._bytes()
        if now is not None and self._first is not None:
            self.samples.append((time.perf_counter() - self._started, now - self._first))

    def _watch(self) -> None:
        every = _SAMPLE_EVERY_SECONDS
        while not self._stop.wait(every):
            self._sample()
            if len(self.samples) > self._MOST:
                self.samples = self.samples[::2]
                every *= 2


def anonymous_bytes() -> int | None:
    """Anonymous resident memory of this process, or None where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None
