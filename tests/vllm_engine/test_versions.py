"""Which vLLM the plugin runs in. Needs none."""

from __future__ import annotations

import pytest

from moeq.engines.vllm import names, refusal
from moeq.schemes import OnlineQuantScheme


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu", "0.33.1.dev3+gabc", "0.31"])
def test_known_versions(version: str) -> None:
    assert refusal(version) is None


@pytest.mark.parametrize("version", ["0.25.9", "0.34.0", "0.3.3", "1.0.0", "dev"])
def test_other_versions_are_refused_with_a_way_out(version: str) -> None:
    reason = refusal(version)
    assert reason is not None
    assert f"vLLM {version} is not among" in reason.message
    assert "0.26 to 0.33" in reason.message
    assert "compressed-tensors" in reason.hint


def test_every_scheme_has_a_name() -> None:
    assert {f"moeq_{scheme.value}" for scheme in OnlineQuantScheme} < set(names())
