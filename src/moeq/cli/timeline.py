"""A load in a process of its own, and its memory over time."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def timeline_of(folder: Path, quantization: dict[str, Any], device: str) -> dict[str, Any]:
    """Load a model and let it go again.

    Returns:
        seconds, planned_peak_bytes, actual_peak_bytes (None where it cannot be read), final_bytes,
        and timeline: (seconds since the start, bytes beyond what the process had).
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(_load, folder, quantization, device).result()


def _load(folder: Path, quantization: dict[str, Any], device: str) -> dict[str, Any]:
    from moeq.cli.schemes import quiet_transformers
    from moeq.config import OnlineQuantizationConfig
    from moeq.engines.load import load, report_of

    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_transformers()
    config: OnlineQuantizationConfig = OnlineQuantizationConfig.from_dict(quantization)
    report = report_of(load(folder, config, device=device))
    return {
        "seconds": report.seconds,
        "planned_peak_bytes": report.peak_bytes_planned,
        "actual_peak_bytes": report.peak_bytes_actual,
        "final_bytes": report.total_bytes_after,
        "timeline": report.timeline,
    }


def _end_with_parent() -> None:
    """Who is killed can end nobody, and a model would stay in memory."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
