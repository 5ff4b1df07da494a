"""Two processes that share one model's experts, over gloo on the CPU.

One launch for all tests, because to import transformers twice takes longer than all they do; what
they do is in `ranks.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("PyTorch was built without gloo", allow_module_level=True)
pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers < 5.21")

from tests.engines.ranks import CHECKS, RANKS, make_folders

SECONDS = 300
"""Of all checks together, on a busy machine."""


class Launch:
    """What came of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_folders(folder)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        worker = ["--nproc-per-node", str(RANKS), "-m", "tests.engines.ranks", str(folder)]
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        with (folder / "output").open("w") as output:
            subprocess.run(
                launcher + worker,
                env=environment,
                cwd=root,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
                check=False,
            )

    def passed(self, check: str) -> bool:
        return all((self.folder / f"{check}.{rank}").exists() for rank in range(RANKS))


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return Launch(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(check: str, launch: Launch) -> None:
    if not launch.passed(check):
        pytest.fail((launch.folder / "output").read_text(), pytrace=False)
