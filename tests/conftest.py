"""Settings that every test shares."""

from __future__ import annotations

from hypothesis import settings

# The same examples on every run, and no limit on a single one: shared machines stall.
settings.register_profile("moeq", derandomize=True, deadline=None, database=None)
settings.load_profile("moeq")
