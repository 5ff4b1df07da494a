"""Two processes that share one model's experts, over gloo on the CPU.

One launch for all tests, because to import transformers twice takes longer than all they do; what
they do is in `ranks.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.distributed.configuration_utils import DistributedConfig

from moeq.engines.hf_ranks import ranks_of
from moeq.errors import ModelError

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("PyTorch was built without gloo", allow_module_level=True)

from tests.engines.ranks import CHECKS, RANKS, make_folders

HAS_RANKS = hasattr(DistributedConfig(), "ep_implementation")

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


@pytest.mark.skipif(not HAS_RANKS, reason="moeq's ranks need transformers 5.23")
@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(check: str, launch: Launch) -> None:
    if not launch.passed(check):
        pytest.fail((launch.folder / "output").read_text(), pytrace=False)


def test_earlier_transformers_split_experts_in_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = SimpleNamespace(tp_size=2, enable_expert_parallel=True)
    model = SimpleNamespace(config=SimpleNamespace(distributed_config=earlier))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ModelError, match=r"needs transformers 5\.23"):
        ranks_of(model)


@pytest.mark.parametrize("config", [None, DistributedConfig()])
def test_one_process_is_no_rank(config: DistributedConfig | None) -> None:
    assert ranks_of(SimpleNamespace(config=SimpleNamespace(distributed_config=config))) is None
