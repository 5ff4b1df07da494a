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

_MOST_SAMPLES = 400

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
    CUDA device, what PyTorch has allocated there, whose highest PyTorch itself keeps.

    Anonymous pages are what a process cannot give back; mapped files are left out. Read from
    /proc, so `peak_bytes` stays None where there is none (macOS). A load that fails need not leave
    it: the sampling thread ends when nobody holds the object any more.

    Attributes:
        peak_bytes: the most beyond what there was at first, once it has been left.
        samples: (seconds since it was entered, bytes beyond what there was); some hundreds.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.peak_bytes: int | None = None
        self.samples: list[tuple[float, int]] = []
        on_gpu = device is not None and device.type == "cuda" and torch.cuda.is_available()
        self._device = device if on_gpu else None
        self._stop = threading.Event()
        self._every = _SAMPLE_EVERY_SECONDS * (10 if on_gpu else 1)  # to ask PyTorch takes longer
        self._keep_every = self._every
        self._thread = threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True)
        self._highest = self._first = 0
        self._is_known = False

    def __enter__(self) -> PeakMemory:
        self._started = time.perf_counter()
        if self._device is not None:
            # Before the first use of CUDA there are no statistics to reset
            torch.cuda.init()  # type: ignore[no-untyped-call]
            torch.cuda.reset_peak_memory_stats(self._device)
        first = self._now()
        if first is not None:
            self._first = self._highest = first
            self._is_known = True
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if not self._is_known:
            return
        self._thread.join()
        self.sample()
        if self._device is not None:
            self._highest = torch.cuda.max_memory_allocated(self._device)
        self.peak_bytes = self._highest - self._first

    def sample(self) -> float:
        """Look once; seconds until the next time, 0 once it has been left."""
        now, seconds = self._now() or 0, time.perf_counter() - self._started
        self._highest = max(self._highest, now)
        if not self.samples or seconds - self.samples[-1][0] >= self._keep_every:
            self.samples.append((seconds, now - self._first))
        if len(self.samples) > _MOST_SAMPLES:
            self.samples = self.samples[::2]
            self._keep_every *= 2
        return 0.0 if self._stop.is_set() else self._every

    def _now(self) -> int | None:
        if self._device is None:
            return anonymous_bytes()
        return torch.cuda.memory_allocated(self._device)


def _watch(memory: weakref.ref[PeakMemory]) -> None:
    while (watched := memory()) is not None and (seconds := watched.sample()):
        del watched
        time.sleep(seconds)


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
