"""The engine's fixtures: quiet, one thread, and what forbids to allocate."""

from __future__ import annotations

from tests.engines.conftest import _one_thread, _quiet, nothing_allocated

__all__ = ["_one_thread", "_quiet", "nothing_allocated"]
