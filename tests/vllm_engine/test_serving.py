"""`moeq serve --engine vllm`."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.serving import check_answers, check_end, serving, with_template
from tests.vllm_engine.conftest import PYTHON

pytestmark = pytest.mark.engine

OPTIONS = ["--", "--max-model-len", "512", "--enforce-eager"]


def test_vllm_answers_and_ends(tmp_path: Path) -> None:
    folder = with_template(tmp_path / "tiny")
    arguments = ["-q", "int8_per_channel_weight_only", "--engine", "vllm", *OPTIONS]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with serving(PYTHON, folder, arguments, environment) as server:
        said = "".join(server.said)
        assert "100% of expert weights quantized" in said
        assert "moeq: experts in int8_per_channel_weight_only, kernels: cpu" in said
        assert said.endswith(": tiny, by vLLM\n")
        check_answers(server)
        check_end(server, signal.SIGTERM)
