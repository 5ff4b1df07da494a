"""A checkpoint that moeq saved and that somebody changed since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeq
from moeq.errors import CheckpointError
from tests.engines.tools import load

W8A8 = "int8_per_channel"


@pytest.fixture
def saved(qwen: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    load(qwen, scheme=W8A8).save_pretrained(folder)
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
    file = saved / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[f"model.layers.1.{name}"].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        moeq.load(saved)


def test_saving_over_shards_leaves_a_folder_that_loads(qwen: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    model = load(qwen, scheme=W8A8)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    model.save_pretrained(folder)
    again = moeq.load(folder).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
