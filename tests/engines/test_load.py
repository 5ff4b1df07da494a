"""Calls that are wrong, `moeq.load`, what was saved before, and what is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import moeq
from moeq import OnlineQuantizationConfig, report_of
from moeq.engines.load import quantization_of
from moeq.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    ModelError,
)
from tests.engines.tools import (
    EXPERTS,
    FP8,
    INT8,
    QWEN,
    amend,
    assert_same_state,
    load,
    quantized_layers,
    rewrite,
)

# What is wrong with a call


def test_a_map_over_several_devices(qwen: Path) -> None:
    with pytest.raises(ModelError, match="device_map"):
        load(qwen, device_map={"model": "cpu", "lm_head": "meta"})


def test_a_map_to_the_disk(qwen: Path) -> None:
    with pytest.raises(ModelError, match="device_map"):
        load(qwen, device_map={"": "disk"})


@pytest.mark.parametrize(
    "device_map", [None, "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}]
)
def test_a_map_to_one_device(device_map: Any, qwen: Path) -> None:
    assert report_of(load(qwen, device_map=device_map)).coverage == 1.0


def test_auto_is_one_device(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load(qwen, device_map="auto").device == torch.device("cpu")


def test_a_state_dict_is_no_checkpoint(qwen: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(qwen)
    tensors = load_file(qwen / "model.safetensors")
    with pytest.raises(CheckpointError, match="a state dict"):
        load(None, config=config, state_dict=tensors)  # type: ignore[arg-type]


def test_a_backend_that_is_none(qwen: Path, nothing_allocated: None) -> None:
    with pytest.raises(BackendError, match="gpu"):
        load(qwen, backend="gpu")


# moeq.load


def test_load_tells_how_far_it_is(qwen: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = moeq.load(qwen, INT8, progress=lambda done, total: seen.append((done, total)))
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    done = [read for read, _ in seen]
    assert done == sorted(done)
    assert len(seen) > 1  # what we read by chunks, then the share of transformers
    assert {total for _, total in seen} == {done[-1]} == {report_of(model).total_bytes_before}


def test_load_takes_a_config_or_json(qwen: Path) -> None:
    config = OnlineQuantizationConfig(INT8, ignore=[EXPERTS])
    as_json = json.dumps({"quantization": INT8, "ignore": [EXPERTS]})
    for quantization in (config, as_json):
        model = moeq.load(qwen, quantization, dtype=torch.float32)
        assert quantization_of(model) == config
        assert model.dtype == torch.float32


def test_load_of_what_moeq_saved(qwen: Path, tmp_path: Path) -> None:
    moeq.save(moeq.load(qwen, INT8), tmp_path / "saved")
    again = moeq.load(tmp_path / "saved")
    assert report_of(again).coverage == 1.0
    with pytest.raises(ConfigError, match="already quantized by moeq"):
        moeq.load(tmp_path / "saved", INT8)


def test_load_wants_a_scheme_and_a_device(qwen: Path) -> None:
    with pytest.raises(ConfigError, match="no scheme is named"):
        moeq.load(qwen)
    with pytest.raises(ConfigError, match="unknown device 'quantum'"):
        moeq.load(qwen, INT8, device="quantum")


@pytest.mark.parametrize(
    "entries",
    [
        {"architectures": None},
        {"architectures": []},
        {"architectures": 7},
        {"architectures": ["NoSuchModel"]},
        {"architectures": ["pipeline"]},  # of transformers, but no model
        {"quantization_config": None},
    ],
    ids=str,
)
def test_load_takes_a_careless_config(entries: dict[str, Any], qwen: Path) -> None:
    amend(qwen, entries)
    assert type(moeq.load(qwen, INT8)).__name__ == "Qwen2MoeForCausalLM"


@pytest.mark.usefixtures("nothing_allocated")
@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"model_type": "gpt9"}, "no model type 'gpt9'"),
        ({"model_type": ["mixtral"]}, "not the config of a model"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"already quantized \(fp8\)"),
        ({"quantization_config": {"load_in_8bit": True}}, r"already quantized \(unknown\)"),
        ({"quantization_config": {}}, r"already quantized \(unknown\)"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"quantization_config": "awq"}, r"already quantized \(awq\)"),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, r"\(mxfp4\)"),
    ],
    ids=str,
)
def test_load_refuses_a_config(entries: dict[str, Any], says: str, qwen: Path) -> None:
    amend(qwen, entries)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{says}"):
        moeq.load(qwen, INT8)


def test_a_saved_checkpoint_with_a_scale_missing(qwen: Path, tmp_path: Path) -> None:
    moeq.save(moeq.load(qwen, INT8), tmp_path / "saved")

    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{EXPERTS}.w2_scale"]

    rewrite(tmp_path / "saved", drop)
    with pytest.raises(CheckpointError, match=rf"{EXPERTS}\.w2_scale: missing"):
        moeq.load(tmp_path / "saved")


def test_a_saved_checkpoint_of_another_scheme(qwen: Path, tmp_path: Path) -> None:
    """Codes of int8 read as fp8 would be a model of noise."""
    moeq.save(moeq.load(qwen, INT8), tmp_path / "saved")
    config = quantization_of(moeq.load(tmp_path / "saved")).to_dict()
    amend(tmp_path / "saved", {"quantization_config": config | {"moe": FP8}})
    with pytest.raises(CheckpointError, match=r"int8.*expected torch\.float8_e4m3fn"):
        moeq.load(tmp_path / "saved")


@pytest.mark.parametrize("kwargs", [{"max_shard_size": "30KB"}, {}], ids=str)
def test_ways_to_save(kwargs: dict[str, Any], qwen: Path, tmp_path: Path) -> None:
    model = load(qwen, scheme=FP8)
    for folder in (tmp_path / "once", tmp_path / "twice"):
        moeq.save(model, folder, **kwargs)
        again = QWEN.model_class.from_pretrained(folder, variant="moeq")
        assert_same_state(again, model)
        model = again


@pytest.mark.parametrize("choice", [{"ignore": [EXPERTS]}, {"targets": {EXPERTS: "fp8_per_block"}}])
def test_saving_what_is_quantized_in_part(
    choice: dict[str, Any], qwen: Path, tmp_path: Path
) -> None:
    """The other layer's experts go back to what the hub has: a tensor each."""
    model = load(qwen, **choice)
    moeq.save(model, tmp_path / "saved")
    other = set(QWEN.experts) - quantized_layers(model)
    assert f"{other.pop()}.0.gate_proj.weight" in load_file(
        tmp_path / "saved" / "model.moeq.safetensors"
    )
    again = QWEN.model_class.from_pretrained(tmp_path / "saved", variant="moeq")
    assert_same_state(again, model)
    assert quantization_of(again) == quantization_of(model)


def test_a_saved_checkpoint_in_another_dtype(qwen: Path, tmp_path: Path) -> None:
    """Activations and what is not quantized change, codes and scales do not."""
    model = load(qwen, scheme=FP8)
    moeq.save(model, tmp_path / "saved")
    again = QWEN.model_class.from_pretrained(
        tmp_path / "saved", variant="moeq", dtype=torch.float32
    )
    assert again.dtype == torch.float32
    assert_same_state(again.get_submodule(EXPERTS), model.get_submodule(EXPERTS))
    assert again(torch.tensor([[5, 6]])).logits.dtype == torch.float32


# What is reported


def test_report(qwen: Path) -> None:
    model = moeq.load(qwen, INT8)
    report = report_of(model)
    codes = 2 * 4 * 3 * 24 * 32
    scales = 2 * 4 * (48 + 32) * 4
    assert report.expert_bytes_before == 2 * codes
    assert report.expert_bytes_after == codes + scales
    assert report.total_bytes_before == sum(
        tensor.nbytes for tensor in load_file(qwen / "model.safetensors").values()
    )
    assert report.total_bytes_after == sum(p.nbytes for p in model.parameters())
    assert report.coverage == 1.0
    assert report.kernels == {f"moe {INT8}": "cpu"}
    assert report.kept["lm_head"] == "output embeddings"
    assert report.kept["model.layers.0.self_attn.q_proj"] == "linear not covered"
    assert report.peak_bytes_planned > report.total_bytes_after
    assert report.peak_bytes_actual is None or report.peak_bytes_actual >= 0
    assert 0 < report.seconds < 60
    assert any("100% of expert weights" in line for line in report.lines())


def test_only_our_models_have_a_report(qwen: Path) -> None:
    for model in (nn.Linear(2, 2), QWEN.model_class.from_pretrained(qwen)):
        for ask in (report_of, quantization_of):
            with pytest.raises(ModelError, match="not quantized by moeq"):
                ask(model)
