"""What every test of an engine needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moeq.methods.base import OnlineMoEMethodBase
from moeq.methods.linear import OnlineLinearMethod
from tests.engines.models import Architecture
from tests.engines.tools import QWEN


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """No progress bars, and none of transformers' notes about toy configs, in a test's output."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _architecture_is_there(request: pytest.FixtureRequest) -> None:
    """Older releases of transformers lack some."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    found = parameters.get("architecture")
    if found is not None and found.missing:
        pytest.skip(found.missing)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Architecture], Path]:
    """A bf16 checkpoint of a tiny model, in the hub's layout."""

    def to_folder(architecture: Architecture, **kwargs: Any) -> Path:
        architecture.make().to(torch.bfloat16).save_pretrained(tmp_path, **kwargs)
        return tmp_path

    return to_folder


@pytest.fixture
def qwen(save: Callable[[Architecture], Path]) -> Path:
    return save(QWEN)


@pytest.fixture
def nothing_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if any weight takes memory: what is wrong is said before that."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("weights were allocated")

    monkeypatch.setattr(OnlineMoEMethodBase, "materialize", refuse)
    monkeypatch.setattr(OnlineLinearMethod, "load", refuse)
