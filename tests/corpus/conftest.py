"""Two good checkpoints, the command line in this process, and the engine's fixtures."""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from moeq.cli import main
from tests.corpus.cases import make_shards, make_whole
from tests.engines.conftest import _one_thread, _quiet, nothing_allocated

__all__ = ["_one_thread", "_quiet", "nothing_allocated"]

Run = Callable[..., "tuple[int, str, str]"]


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two good checkpoints, not to be changed."""
    folder = tmp_path_factory.mktemp("good")
    make_whole(folder / "whole")
    make_shards(folder / "shards")
    return folder


@pytest.fixture
def moeq(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process: its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moeq", *map(str, arguments)])
        capfd.readouterr()
        code: object = 0
        try:
            with warnings.catch_warnings():  # `main` prints them in its own way
                warnings.simplefilter("always", UserWarning)
                main()
        except SystemExit as exit_:
            code = exit_.code
        out, err = capfd.readouterr()
        assert isinstance(code, int)
        return code, out, err

    return run


def names(folder: Path) -> set[str]:
    """Of everything in a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def digests(folder: Path) -> dict[str, str]:
    """Of every file in a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
