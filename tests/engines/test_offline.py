"""`quantize_checkpoint`: the folder that loading and saving would give, without the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import moeq
from moeq import OnlineQuantizationConfig
from moeq.cli import cli
from moeq.embedded import model_folder
from moeq.engines.hf_stream import LayerStream
from moeq.engines.offline import quantize_checkpoint
from moeq.errors import CheckpointError
from moeq.schemes import OnlineQuantScheme
from tests.engines.models import ARCHITECTURES, Architecture
from tests.engines.test_running import write_large_checkpoint
from tests.engines.tools import EXPERTS, FP8, INT8, assert_same_state, load

Save = Callable[[Architecture], Path]


@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda row: row.name)
def test_it_is_what_loading_gives(architecture: Architecture, fused: bool, tmp_path: Path) -> None:
    source = tmp_path / "source"
    architecture.make().to(torch.bfloat16).save_pretrained(source, save_original_format=not fused)
    expected = load(source, architecture, INT8)
    quantize_checkpoint(source, OnlineQuantizationConfig(INT8), tmp_path / "out")
    found = architecture.model_class.from_pretrained(tmp_path / "out", variant="moeq")
    assert_same_state(found, expected)


@pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)
def test_every_scheme_and_shards(scheme: OnlineQuantScheme, tmp_path: Path) -> None:
    expected = moeq.load(model_folder(), scheme.value)
    seen: list[tuple[int, int]] = []
    for shard_bytes in (10**9, 3 * 10**6):
        out = tmp_path / str(shard_bytes)
        quantize_checkpoint(
            model_folder(),
            OnlineQuantizationConfig(scheme),
            out,
            shard_bytes=shard_bytes,
            progress=lambda done, total: seen.append((done, total)),
        )
        assert (len(list(out.glob("*.safetensors"))) == 1) == (shard_bytes == 10**9)
        assert_same_state(moeq.load(out), expected)
        assert seen[-1][0] == seen[-1][1]


def test_what_is_left_alone(qwen: Path, tmp_path: Path) -> None:
    config = OnlineQuantizationConfig(FP8, ignore=[EXPERTS])
    quantize_checkpoint(qwen, config, tmp_path / "out")
    assert_same_state(moeq.load(tmp_path / "out"), load(qwen, scheme=FP8, ignore=[EXPERTS]))


def test_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", str(model_folder()), "-q", FP8, "--out", str(out)]
    result = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["coverage"] == 1.0
    assert told["bytes_after"] < told["bytes_before"]
    assert sum(f.stat().st_size for f in out.glob("*.safetensors")) >= told["bytes_after"]
    assert moeq.report_of(moeq.load(out)).total_bytes_after == told["bytes_after"]


_MEASURE = """
import sys, torch
from moeq import OnlineQuantizationConfig
from moeq.engines.hf_stream import LayerStream
from moeq.engines.offline import quantize_checkpoint
from moeq.memory import PeakMemory

torch.set_num_threads(1)
with PeakMemory() as memory:
    quantize_checkpoint(sys.argv[1], OnlineQuantizationConfig(sys.argv[2]), sys.argv[3])
print(memory.peak_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure with")
def test_memory_is_that_of_a_window(tmp_path: Path) -> None:
    """302 MB of experts in bf16 become 151 MB that this process never holds."""
    write_large_checkpoint(tmp_path / "source", fused=False)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "source"), INT8, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 110e6


class Interrupted:
    """An interrupt once so many bytes were read."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, done: int, total: int) -> None:
        if done > self.after:
            raise KeyboardInterrupt


def quantize_in_parts(out: Path, scheme: str = INT8, **options: Any) -> None:
    config = OnlineQuantizationConfig(scheme)
    quantize_checkpoint(model_folder(), config, out, shard_bytes=10**6, **options)


@pytest.fixture
def shards_done(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with every shard that is quantized to its end."""
    done: list[Any] = []
    run = LayerStream.run

    def counted(self: LayerStream, *args: Any) -> None:
        run(self, *args)
        done.append(self)

    monkeypatch.setattr(LayerStream, "run", counted)
    return done


def test_what_is_finished_is_not_done_again(tmp_path: Path, shards_done: list[Any]) -> None:
    expected = moeq.load(model_folder(), INT8)
    shards_done.clear()
    quantize_in_parts(tmp_path / "whole")
    every = len(shards_done)
    assert every > 5
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quantize_in_parts(out, resume=True, progress=Interrupted(7 * 10**6))
        assert not out.exists()
    before = len(shards_done) - every
    assert 0 < before < every
    seen: list[tuple[int, int]] = []
    quantize_in_parts(out, resume=True, progress=lambda *both: seen.append(both))
    assert len(shards_done) == 2 * every
    assert seen[-1][0] == seen[-1][1]
    assert_same_state(moeq.load(out), expected)
    files = {path.name for path in out.iterdir()}
    assert files == {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_files_that_are_no_longer_whole_are_done_again(tmp_path: Path) -> None:
    expected = moeq.load(model_folder(), INT8)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize_in_parts(out, resume=True, progress=Interrupted(7 * 10**6))
    (kept,) = tmp_path.glob(".out.*.partial")
    first, *_ = sorted(kept.glob("*.safetensors"))
    os.truncate(first, 100)
    (kept / ".finished.draft").write_text("{")
    quantize_in_parts(out, resume=True)
    assert_same_state(moeq.load(out), expected)
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("scheme", [INT8, FP8])
def test_what_was_half_done_at_the_end_is_done_again(scheme: str, tmp_path: Path) -> None:
    """Killed while the last small files were written, or before the folder got its name."""
    quantize_in_parts(tmp_path / "whole", scheme)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize_in_parts(out, scheme, resume=True, progress=Interrupted(7 * 10**6))
    (kept,) = tmp_path.glob(".out.*.partial")
    (kept / "tokenizer.json").write_text('{"half')
    (kept / "added_tokens.json").write_text("{}")  # the source had one then
    (kept / "moeq.json").write_text("{}")
    quantize_in_parts(out, scheme, resume=True)
    found, expected = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (out, tmp_path / "whole")
    )
    assert found == expected


def test_another_recipe_starts_anew(tmp_path: Path, shards_done: list[Any]) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize_in_parts(out, resume=True, progress=Interrupted(7 * 10**6))
    shards_done.clear()
    quantize_in_parts(out, FP8, resume=True)
    assert len(shards_done) > 5
    assert_same_state(moeq.load(out), moeq.load(model_folder(), FP8))


def test_one_process_at_a_time_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def second(done: int, total: int) -> None:
        with pytest.raises(CheckpointError, match="another process writes it"):
            quantize_in_parts(out, resume=True)

    quantize_in_parts(out, resume=True, progress=second)
    assert out.is_dir()


def test_without_resume_nothing_is_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize_in_parts(tmp_path / "out", progress=Interrupted(7 * 10**6))
    assert not list(tmp_path.iterdir())
