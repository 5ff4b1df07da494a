"""Settings that every test shares."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# The same examples on every run, and no limit on a single one: shared machines stall.
settings.register_profile("moeq", derandomize=True, deadline=None, database=None)
settings.load_profile("moeq")

if not torch.cuda.is_available():
    # Triton kernels ask when they are defined whether to compile; see tests/kernels/triton
    os.environ["TRITON_INTERPRET"] = "1"
