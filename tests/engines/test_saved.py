"""Saving, and a checkpoint that moeq saved and that somebody changed since."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeq
from moeq.errors import CheckpointError, ModelError
from tests.engines.tools import QWEN, assert_same_state, load, rewrite

W8A8 = "int8_per_channel"
INT4 = "int4_per_group_weight_only"


@pytest.fixture
def saved(qwen: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    moeq.save(load(qwen, scheme=W8A8), folder)
    return folder


def edit_config(folder: Path, **entries: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(entries)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "entries", [{"moe": "none"}, {"linear": "none"}, {"ignore": ["model.layers.0.mlp.experts"]}]
)
def test_codes_that_the_config_no_longer_covers(entries: dict[str, Any], saved: Path) -> None:
    edit_config(saved, **entries)
    with pytest.raises(CheckpointError, match="config does not cover"):
        moeq.load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("name", ["mlp.experts.w13_scale", "self_attn.q_proj.weight_scale"])
def test_damaged_scales(name: str, value: float, saved: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"model.layers.1.{name}"].view(-1)[-1] = value

    rewrite(saved, damage)
    with pytest.raises(CheckpointError, match=name):
        moeq.load(saved)


@pytest.mark.parametrize("byte", [0x00, 0x80, 0x07, 0x87, 0x7F, 0xFF])
@pytest.mark.parametrize(
    "name",
    [
        "mlp.experts.w13_group_scale",
        "mlp.experts.w2_group_scale",
        "self_attn.q_proj.weight_group_scale",
    ],
)
def test_damaged_scales_of_groups(name: str, byte: int, qwen: Path, tmp_path: Path) -> None:
    """Zeros, subnormals and NaN, of either sign."""
    model = load(qwen, scheme=INT4)
    moeq.save(model, tmp_path / "saved")
    assert_same_state(moeq.load(tmp_path / "saved"), model)

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"model.layers.1.{name}"].view(torch.uint8).view(-1)[-1] = byte

    rewrite(tmp_path / "saved", damage)
    with pytest.raises(CheckpointError, match=rf"layers\.1\.{name}: .*zeros, subnormal"):
        moeq.load(tmp_path / "saved")


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0])
def test_damaged_scales_of_rows_above_groups(value: float, qwen: Path, tmp_path: Path) -> None:
    moeq.save(load(qwen, scheme=INT4), tmp_path / "saved")

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.experts.w2_scale"][3, 5] = value

    rewrite(tmp_path / "saved", damage)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts\.w2_scale"):
        moeq.load(tmp_path / "saved")


def test_scales_of_groups_are_missing(qwen: Path, tmp_path: Path) -> None:
    moeq.save(load(qwen, scheme=INT4), tmp_path / "saved")
    name = "model.layers.1.mlp.experts.w13_group_scale"

    def lose(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    rewrite(tmp_path / "saved", lose)
    with pytest.raises(CheckpointError, match=name):
        moeq.load(tmp_path / "saved")


def test_a_folder_appears_whole_or_not_at_all(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(qwen, scheme=W8A8)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            moeq.save(model, tmp_path / "sub" / "saved")
    assert not (tmp_path / "sub").exists()
    moeq.save(model, tmp_path / "sub" / "saved", max_shard_size="20KB")
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["saved"]
    assert_same_state(moeq.load(tmp_path / "sub" / "saved"), model)
    with pytest.raises(CheckpointError, match="saved: exists"):
        moeq.save(model, tmp_path / "sub" / "saved")
    (tmp_path / "empty").mkdir()
    moeq.save(model, tmp_path / "empty")
    assert_same_state(moeq.load(tmp_path / "empty"), model)


def test_what_is_written_has_modes_by_umask_and_true_sums(saved: Path) -> None:
    manifest = json.loads((saved / "moeq.json").read_text())["files"]
    umask = os.umask(0)
    os.umask(umask)
    names = {path.name for path in saved.iterdir()} - {"moeq.json"}
    assert manifest.keys() == names
    for name, entry in manifest.items():
        path = saved / name
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
        assert entry["bytes"] == path.stat().st_size
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_copy_that_stopped_halfway(saved: Path) -> None:
    file = saved / "model.moeq.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(CheckpointError, match=rf"{len(whole) - 7} bytes, expected {len(whole)}"):
        moeq.load(saved)


def test_a_disk_that_is_too_small(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(qwen, scheme=W8A8)
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"0\.0 GB free, 0\.1 GB needed"):
        moeq.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_without_moeq_it_does_not_open(saved: Path) -> None:
    """Codes under names that transformers does not know would leave it random experts."""
    code = "import sys; from transformers import Qwen2MoeForCausalLM as M; M.from_pretrained"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}(sys.argv[1])", str(saved)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "no file named model.safetensors" in done.stderr


def test_transformers_own_way_to_save_is_refused(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"use moeq\.save"):
        load(qwen, scheme=W8A8).save_pretrained(tmp_path / "saved")


def test_models_of_others_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not quantized by moeq"):
        moeq.save(QWEN.make(), tmp_path / "saved")
