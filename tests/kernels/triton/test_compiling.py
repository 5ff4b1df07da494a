"""Every kernel compiles for the GPUs it is chosen on, and fits into their shared memory.

The interpreter takes what the compiler does not (a branch after a return, types that differ between
branches), so both have to pass.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeq.schemes import OnlineQuantScheme

GPUS = {"A100": (80, 163 << 10), "L40S": (89, 99 << 10), "H100": (90, 227 << 10)}
"""Compute capability, and the shared memory that a block may have, in bytes (CUDA programming
guide, technical specifications per compute capability)."""


@pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)
@pytest.mark.parametrize("gpu", GPUS)
def test_compiles_and_fits(gpu: str, scheme: OnlineQuantScheme, tmp_path: Path) -> None:
    capability, limit = GPUS[gpu]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.kernels.triton.compiling"),
            *(str(capability), str(limit), scheme.value),
        ],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) >= 8
    too_much = {key: shared for key, shared in found.items() if shared > limit}
    assert not too_much
