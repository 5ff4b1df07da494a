"""Every bad checkpoint of `cases`, through the real commands, and those that are fine by design."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moeq.cli import main
from tests.corpus.cases import CASES, Case, make_shards, make_whole
from tests.engines.tools import INT8

Run = Callable[..., "tuple[int, str, str]"]


@pytest.fixture(scope="module")
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
            main()
        except SystemExit as exit_:
            code = exit_.code
        out, err = capfd.readouterr()
        assert isinstance(code, int)
        return code, out, err

    return run


def refused(result: tuple[int, str, str], says: tuple[str, ...]) -> None:
    """Exit code 2; an error, a hint and nothing else; all that is to be said, and no escapes."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    lines = err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"], err
    assert [part for part in says if part not in err] == [], err
    assert all(line.isprintable() for line in lines)


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bad_checkpoint_is_refused(
    case: Case, good: Path, tmp_path: Path, moeq: Run, request: pytest.FixtureRequest
) -> None:
    model = tmp_path / "model"
    shutil.copytree(good / ("shards" if case.in_shards else "whole"), model)
    case.damage(model)
    before = contents(tmp_path)
    if case.from_headers:
        request.getfixturevalue("nothing_allocated")
        refused(moeq("plan", model), case.says)
    refused(moeq("quantize", model, "-q", INT8, "--out", tmp_path / "out"), case.says)
    refused(moeq("generate", model, "-q", INT8, "--prompt", "once"), case.says)
    assert contents(tmp_path) == before
