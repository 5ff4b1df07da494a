"""compressed-tensors: another library's reading of our files gives our weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import MXFP4A16
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file, save_file
from torch import Tensor

import moeq
from moeq import OnlineQuantizationConfig
from moeq.cli import cli
from moeq.engines.offline import quantize_checkpoint
from moeq.errors import CheckpointError, ConfigError, MoeqError
from moeq.quantize import dequantize
from moeq.schemes import Granularity, OnlineQuantScheme
from tests.engines.models import BY_NAME, Architecture
from tests.engines.tools import INT8, QWEN

SCHEMES = [s for s in OnlineQuantScheme if s.granularity is not Granularity.TENSOR]
EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.value)

MIXTRAL = BY_NAME["mixtral"]
"""Its projections are called w1, w2 and w3."""

INT4, MXFP4 = "int4_per_group_weight_only", "mxfp4_weight_only"


PARTS = ("gate_proj", "up_proj", "down_proj")


def with_whole_groups(architecture: Architecture) -> Architecture:
    """Rows of 32 and 64 weights, which the format asks for where groups share a scale."""
    sizes = {name: 64 for name in architecture.arguments if name.endswith("intermediate_size")}
    return replace(architecture, arguments=architecture.arguments | sizes)


def exported(source: Path, out: Path, config: Any, **options: Any) -> dict[str, Tensor]:
    quantize_checkpoint(source, config, out, file_format="compressed-tensors", **options)
    tensors: dict[str, Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def decompressed(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every quantized weight, by compressed-tensors."""
    entries = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(entries)
    compressor: Any = BaseCompressor.load_from_registry(entries["format"])
    found = {}
    for name in tensors:
        base, dot, kind = name.rpartition(".weight_scale")
        if not dot or kind:
            continue
        (group,) = [
            group
            for group in config.config_groups.values()
            if any(match_name(base, target) for target in group.targets)
        ]
        parts = {n.removeprefix(f"{base}."): t for n, t in tensors.items() if n.startswith(base)}
        if group.weights.strategy == "block":  # which the library has no compressor for
            assert group.weights.block_structure == [128, 128]
            codes, scale = parts["weight"], parts["weight_scale"]
            found[base] = dequantize(codes, scale, Granularity.BLOCK, dtype=torch.float32)
        else:
            found[base] = compressor.decompress(parts, group)["weight"].float()
    return found


def expected(source: Path, config: Any, names: tuple[str, str, str]) -> dict[str, Tensor]:
    """The same of a model that moeq loads."""
    model = moeq.load(source, config)
    found = {}
    for layer, module in model.named_modules():
        method = getattr(module, "_moeq_method", None)
        if method is None:
            continue
        if hasattr(module, "weight_codes"):
            found[layer] = method.dequantized(module, torch.float32)
            continue
        for expert in range(len(module.w2_codes)):
            w13, w2 = method.dequantized(module, expert)
            for name, weight in zip(names, (*w13.chunk(2), w2), strict=True):
                found[f"{layer}.{expert}.{name}"] = weight
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        assert torch.equal(weight, wanted[name]), name


@EVERY_SCHEME
def test_another_library_reads_the_weights_that_moeq_has(
    scheme: OnlineQuantScheme, save: Callable[[Architecture], Path], tmp_path: Path
) -> None:
    source = save(QWEN if scheme.group is None else with_whole_groups(QWEN))
    config = OnlineQuantizationConfig(scheme)  # linears too, where the scheme covers them
    tensors = exported(source, tmp_path / "out", config)
    assert_same(decompressed(tmp_path / "out", tensors), expected(source, config, PARTS))


@EVERY_SCHEME
def test_names_of_projections_are_those_of_the_checkpoint(
    scheme: OnlineQuantScheme, save: Callable[[Architecture], Path], tmp_path: Path
) -> None:
    source = save(MIXTRAL if scheme.group is None else with_whole_groups(MIXTRAL))
    tensors = exported(source, tmp_path / "out", OnlineQuantizationConfig(moe=scheme))
    (file,) = source.glob("*.safetensors")
    before = load_file(file)
    parts = {".weight_packed": ".weight", ".weight_shape": "", ".weight_scale": ""}
    kept = set()
    for name in tensors:
        for ours, theirs in parts.items():
            if name.endswith(ours):
                name = name.removesuffix(ours) + theirs
        kept.add(name)
    assert before.keys() == {name for name in kept if name.endswith(("weight", "bias"))}
    for name, tensor in before.items():
        if ".experts." not in name:
            assert torch.equal(tensors[name], tensor)
    found = decompressed(tmp_path / "out", tensors)
    for name, weight in found.items():
        source_weight = before[f"{name}.weight"].float()
        # Of four bits the largest of one sign can be clipped by two steps
        steps = {torch.int8: 127, torch.uint8: 4}.get(scheme.weight_dtype, 16)
        step = source_weight.abs().amax() / steps
        assert bool(((weight - source_weight).abs() <= step).all())


def test_shards_have_an_index_of_the_usual_name(qwen: Path, tmp_path: Path) -> None:
    config = OnlineQuantizationConfig(moe="int8_per_channel")
    whole = exported(qwen, tmp_path / "one", config)
    parts = exported(qwen, tmp_path / "many", config, shard_bytes=20_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == parts.keys() == whole.keys()
    for name, tensor in parts.items():
        assert torch.equal(tensor.view(torch.uint8), whole[name].view(torch.uint8))
        assert name in load_file(tmp_path / "many" / index["weight_map"][name])


def test_weight_only_codes_are_packed_with_their_shape(qwen: Path, tmp_path: Path) -> None:
    tensors = exported(qwen, tmp_path / "out", OnlineQuantizationConfig(INT8))
    name = "model.layers.0.mlp.experts.1.down_proj"
    shape = tensors[f"{name}.weight_shape"].tolist()
    assert tensors[f"{name}.weight_packed"].shape == (shape[0], shape[1] // 4)
    assert f"{name}.weight" not in tensors
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = quantization["config_groups"].values()
    # vLLM 0.26 compares it with a number and ends with a TypeError where it is missing
    assert group["weights"]["group_size"] == -1


def test_codes_of_four_bits_have_a_scale_for_each_group(
    save: Callable[[Architecture], Path], tmp_path: Path
) -> None:
    source = save(with_whole_groups(QWEN))
    config = OnlineQuantizationConfig(INT4)
    tensors = exported(source, tmp_path / "out", config)
    model = moeq.load(source, config)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    name = "model.layers.0.mlp.experts.1.down_proj"
    packed, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
    assert tensors[f"{name}.weight_shape"].tolist() == [32, 64]
    assert (packed.dtype, packed.shape) == (torch.int32, (32, 8))
    assert torch.equal(packed.view(torch.uint8), experts.w2_codes[1])  # nothing is repacked
    assert (scale.dtype, scale.shape) == (torch.bfloat16, (32, 2))
    exact = experts.w2_group_scale[1].float() * experts.w2_scale[1][:, None]
    assert torch.equal(scale.float(), exact)
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["format"] == "pack-quantized"
    (group,) = quantization["config_groups"].values()
    assert group["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
    }
    assert group["input_activations"] is None


def test_mxfp4_is_the_bytes_of_the_ocp(
    save: Callable[[Architecture], Path], tmp_path: Path
) -> None:
    source = save(with_whole_groups(QWEN))
    config = OnlineQuantizationConfig(MXFP4)
    tensors = exported(source, tmp_path / "out", config)
    model = moeq.load(source, config)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    name = "model.layers.0.mlp.experts.1.down_proj"
    packed, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
    assert f"{name}.weight_shape" not in tensors
    assert (packed.dtype, packed.shape) == (torch.uint8, (32, 32))
    assert torch.equal(packed, experts.w2_codes[1])
    assert (scale.dtype, scale.shape) == (torch.uint8, (32, 2))
    exact = experts.w2_group_scale[1].float() * experts.w2_scale[1][:, None]
    assert torch.equal(scale.view(torch.float8_e8m0fnu).float(), exact)
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["format"] == "mxfp4-pack-quantized"
    (group,) = quantization["config_groups"].values()
    assert group["input_activations"] is None
    ours = QuantizationConfig.model_validate(quantization).config_groups["group_0"].weights
    theirs: Any = MXFP4A16["weights"]
    assert ours == theirs.model_copy(update={"observer": ours.observer, "zp_dtype": ours.zp_dtype})


def test_groups_below_the_least_scale_of_mxfp4_become_zeros(
    save: Callable[[Architecture], Path], tmp_path: Path
) -> None:
    """2^-127 times a code of one is kept, and its half is not a scale any more."""
    source = save(with_whole_groups(QWEN))
    name = "model.layers.0.mlp.experts.1.down_proj"
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    weight = tensors[f"{name}.weight"]
    weight[0] = 0
    weight[1, :32] = 0  # and the other half of the row is not
    weight[2, 32:] = 2.0**-125
    weight[3, 32:] = -(2.0**-126)
    weight[4] = 2.0**-126
    save_file(tensors, file, metadata={"format": "pt"})
    out = exported(source, tmp_path / "out", OnlineQuantizationConfig(moe=MXFP4))
    scale = out[f"{name}.weight_scale"]
    assert int(scale[1, 0]) == int(scale[3, 1]) == 0
    assert out[f"{name}.weight_packed"][[3, 4], 16:].count_nonzero() == 0
    found = decompressed(tmp_path / "out", out)[name]
    assert found[0].count_nonzero() == found[1, :32].count_nonzero() == 0
    assert torch.equal(found[2, 32:], weight[2, 32:].float())
    assert found[3, 32:].count_nonzero() == found[4].count_nonzero() == 0
    wanted = expected(source, OnlineQuantizationConfig(moe=MXFP4), PARTS)[name]
    assert torch.equal(found[1:3], wanted[1:3])
    assert torch.equal(found[5:], wanted[5:])


@pytest.mark.parametrize("scheme", [INT4, MXFP4])
def test_shards_of_four_bits(
    scheme: str, save: Callable[[Architecture], Path], tmp_path: Path
) -> None:
    source = save(with_whole_groups(QWEN))
    config = OnlineQuantizationConfig(moe=scheme)
    whole = exported(source, tmp_path / "one", config)
    parts = exported(source, tmp_path / "many", config, shard_bytes=8_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert parts.keys() == whole.keys()
    for name, tensor in parts.items():
        assert torch.equal(tensor.view(torch.uint8), whole[name].view(torch.uint8)), name


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        (QWEN, {"quantization": "fp8_per_tensor"}, "no experts with fp8_per_tensor"),
        (BY_NAME["gpt_oss"], {"quantization": INT8}, "one by one and without biases"),
        (
            QWEN,
            {"moe": "int8_per_channel", "linear": "fp8_per_channel"},
            "cannot be float-quantized and int-quantized",
        ),
        (QWEN, {"quantization": INT8, "ignore": ["*"]}, "nothing is left to quantize"),
        # rows of 24
        (QWEN, {"moe": INT4}, r"rows of .*24.* do not pack into whole words and groups: 32 col"),
        (QWEN, {"moe": MXFP4}, r"rows of .*24.* do not pack into whole words and groups: 32 col"),
        (
            with_whole_groups(QWEN),
            {"moe": INT4, "linear": MXFP4},
            "cannot be mxfp4-pack-quantized and pack-quantized",
        ),
        (
            with_whole_groups(QWEN),
            {"moe": INT4, "linear": "int8_per_channel"},
            "cannot be int-quantized and pack-quantized",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(
    architecture: Architecture,
    config: dict[str, Any],
    message: str,
    save: Callable[[Architecture], Path],
    tmp_path: Path,
) -> None:
    source = save(architecture)
    with pytest.raises(MoeqError, match=message):
        exported(source, tmp_path / "out", OnlineQuantizationConfig(**config))
    assert not (tmp_path / "out").exists()


def test_fused_checkpoints_are_refused(save: Callable[..., Path], tmp_path: Path) -> None:
    source = save(QWEN, save_original_format=False)
    with pytest.raises(MoeqError, match="one by one"):
        exported(source, tmp_path / "out", OnlineQuantizationConfig(INT8))


def test_moeq_does_not_take_it_for_its_own(qwen: Path, tmp_path: Path) -> None:
    exported(qwen, tmp_path / "out", OnlineQuantizationConfig(moe="int8_per_channel"))
    with pytest.raises(CheckpointError, match=r"already quantized \(compressed-tensors\)"):
        moeq.load(tmp_path / "out")
    with pytest.raises((CheckpointError, ConfigError)):
        moeq.load(tmp_path / "out", INT8)


def test_the_command(qwen: Path, tmp_path: Path) -> None:
    words = ["quantize", str(qwen), "--moe", "int8_per_channel"]
    words += ["--format", "compressed-tensors", "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["format"] == "compressed-tensors"
