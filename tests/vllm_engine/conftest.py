"""vLLM lives in a virtual environment of its own, which `./run test-vllm` makes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("MOEQ_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
WORKER = Path(__file__).with_name("worker.py")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""vLLM's, and that of the loads it is compared with."""

Job = Callable[..., dict[str, Any]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not PYTHON.exists():
        reason = "no vLLM: ./run test-vllm makes .venv-vllm, or set MOEQ_VLLM_PYTHON"
        for item in items:
            if item.path.is_relative_to(WORKER.parent) and item.get_closest_marker("engine"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def vllm_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Has vLLM load models and judge prompts, see `worker`: in one process, or in ranks."""

    def job(
        model: Path,
        prompts: list[list[int]],
        runs: dict[str, dict[str, Any]],
        *,
        ranks: int = 1,
        plugins: str | None = None,
    ) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("job")
        job_file, result = folder / "job.json", folder / "result.json"
        job_file.write_text(json.dumps({"model": str(model), "prompts": prompts, "runs": runs}))
        # Ranks on one memory node have to be told theirs
        cores = "|".join(map(str, range(ranks))) if ranks > 1 else "nobind"
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(ranks > 1)),
            # Ranks on one memory node have to be told their cores
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_CACHE_ROOT": str(folder / "cache"),
        }
        environment.pop("PYTHONPATH", None)
        if plugins is not None:
            environment["VLLM_PLUGINS"] = plugins
        done = subprocess.run(
            [PYTHON, WORKER, job_file, result],
            env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        if done.returncode or not result.exists():
            pytest.fail(f"vLLM ended with {done.returncode}:\n{done.stderr[-4000:]}")
        found: dict[str, Any] = json.loads(result.read_text())
        found["log"] = done.stdout + done.stderr
        return found

    return job
