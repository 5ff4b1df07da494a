"""What the transformers engine refuses, keeps and reports; how a load behaves that goes wrong."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moeq
from moeq import OnlineQuantizationConfig, report_of
from moeq.engines.load import quantization_of
from moeq.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    ModelError,
    NonFiniteError,
    PatternError,
)
from moeq.methods.base import OnlineMoEMethodBase
from moeq.methods.linear import OnlineLinearMethod
from tests.engines.models import BY_NAME, Architecture

INT8 = "int8_per_channel_weight_only"
FP8 = "fp8_per_channel"

QWEN = BY_NAME["qwen2_moe"]
"""Per expert on disk, a shared expert, and a gate for that which is an `nn.Linear`."""
EXPERTS = QWEN.experts[0]
EXPERT_WEIGHT = f"{EXPERTS}.3.gate_proj.weight"

LLAMA4 = Architecture(
    "llama4",
    "Llama4TextConfig",
    "Llama4ForCausalLM",
    {
        "intermediate_size": 24,
        "intermediate_size_mlp": 40,
        "num_local_experts": 4,
        "head_dim": 8,
        "interleave_moe_layer_step": 1,
    },
    ("model.layers.0.feed_forward.experts", "model.layers.1.feed_forward.experts"),
)
DBRX = Architecture(
    "dbrx",
    "DbrxConfig",
    "DbrxForCausalLM",
    {
        "d_model": 32,
        "n_heads": 4,
        "num_hidden_layers": 1,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {
            "ffn_hidden_size": 24,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    },
    ("transformer.blocks.0.ffn.experts",),
)
NLLB = Architecture(
    "nllb_moe",
    "NllbMoeConfig",
    "NllbMoeForConditionalGeneration",
    {
        "d_model": 32,
        "num_hidden_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "num_experts": 4,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
    },
    ("model.encoder.layers.0.ffn.experts", "model.decoder.layers.0.ffn.experts"),
)
ERNIE_VL = Architecture(
    "ernie4_5_vl_moe",
    "Ernie4_5_VLMoeConfig",
    "Ernie4_5_VLMoeForConditionalGeneration",
    {
        "text_config": {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "moe_intermediate_size": [24, 24],
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
            },
        },
        "vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16},
    },
    (
        "model.language_model.layers.1.mlp.text_moe.experts",
        "model.language_model.layers.1.mlp.vision_moe.experts",
    ),
)
LLAMA = Architecture("llama", "LlamaConfig", "LlamaForCausalLM", {"intermediate_size": 40}, ())

UNREACHABLE = pytest.mark.parametrize(
    "architecture", [LLAMA4, DBRX, NLLB], ids=lambda row: row.name
)


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


def load(folder: Path, architecture: Architecture = QWEN, scheme: Any = INT8, **kwargs: Any) -> Any:
    """As users do it, with transformers' own call."""
    known = ("moe", "linear", "ignore", "targets", "backend")
    config = OnlineQuantizationConfig(
        None if "targets" in kwargs else scheme,
        **{name: kwargs.pop(name) for name in known if name in kwargs},
    )
    return architecture.model_class.from_pretrained(folder, quantization_config=config, **kwargs)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a checkpoint in one file."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def amend(folder: Path, entries: dict[str, Any]) -> None:
    """Change entries of a checkpoint's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(bits(tensor), bits(theirs[name])), name


def quantized_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if hasattr(module, "_moeq_method")}


# What is found


@UNREACHABLE
@pytest.mark.usefixtures("nothing_allocated")
@pytest.mark.parametrize("scheme", [INT8, FP8])
def test_experts_out_of_reach_are_an_error(
    architecture: Architecture, scheme: str, save: Callable[[Architecture], Path]
) -> None:
    with pytest.raises(ModelError, match=architecture.experts[0]) as caught:
        load(save(architecture), architecture, scheme)
    assert f"ignore=['{architecture.experts[0]}']" in caught.value.hint


@UNREACHABLE
def test_experts_out_of_reach_can_be_ignored(
    architecture: Architecture, save: Callable[[Architecture], Path]
) -> None:
    """The linears beside them are quantized, those inside them are not, and the report says so."""
    folder = save(architecture)
    model = load(folder, architecture, FP8, ignore=architecture.experts)
    layers = quantized_layers(model)
    assert layers
    assert not any(name.startswith(architecture.experts) for name in layers)
    report = report_of(model)
    assert {report.kept[name] for name in architecture.experts} == {"ignored by pattern"}
    assert report.coverage == 0.0
    tensors = load_file(folder / "model.safetensors").items()
    experts = [t for name, t in tensors if name.startswith(architecture.experts) and t.ndim > 1]
    assert report.expert_bytes_before == report.expert_bytes_after == sum(t.nbytes for t in experts)


@pytest.mark.usefixtures("nothing_allocated")
def test_a_conversion_that_mixes_experts_is_an_error(
    save: Callable[[Architecture], Path],
) -> None:
    """transformers splits the experts of this checkpoint between two modules."""
    folder = save(ERNIE_VL)
    for ignored in ((), ERNIE_VL.experts[:1], ERNIE_VL.experts[1:]):
        with pytest.raises(ModelError, match="ErnieFuseAndSplitTextVisionExperts"):
            load(folder, ERNIE_VL, ignore=ignored)
    load(folder, ERNIE_VL, ignore=ERNIE_VL.experts)


def test_targets_elsewhere_do_not_ask_for_experts(save: Callable[[Architecture], Path]) -> None:
    model = load(save(LLAMA4), LLAMA4, targets={"re:.*self_attn[.].*": FP8})
    assert len(quantized_layers(model)) == 8


@pytest.mark.usefixtures("nothing_allocated")
@pytest.mark.parametrize("scheme", [INT8, FP8])
def test_a_dense_model_is_an_error(scheme: str, save: Callable[[Architecture], Path]) -> None:
    with pytest.raises(ModelError, match="LlamaForCausalLM has no experts") as caught:
        load(save(LLAMA), LLAMA, scheme)
    assert 'moe="none"' in caught.value.hint


def test_the_linears_of_a_dense_model(save: Callable[[Architecture], Path]) -> None:
    model = load(save(LLAMA), LLAMA, FP8, moe="none")
    assert len(quantized_layers(model)) == 14  # four of attention and three of the MLP, twice


# What is chosen


def test_ignoring_one_layer(qwen: Path) -> None:
    model = load(qwen, ignore=[EXPERTS])
    assert quantized_layers(model) == {QWEN.experts[1]}
    report = report_of(model)
    assert report.coverage == 0.5
    assert report.kept[EXPERTS] == "ignored by pattern"
    plain = QWEN.model_class.from_pretrained(qwen).get_submodule(EXPERTS)
    assert torch.equal(model.get_submodule(EXPERTS).gate_up_proj, plain.gate_up_proj)


def test_targets_choose_a_scheme_per_layer(qwen: Path) -> None:
    model = load(
        qwen, targets={"*.1.mlp.experts": "fp8_per_block", "re:.*experts": INT8, "lm_head": FP8}
    )
    found = {
        name: module._moeq_method.scheme.value
        for name, module in model.named_modules()
        if hasattr(module, "_moeq_method")
    }
    assert found == {QWEN.experts[0]: INT8, QWEN.experts[1]: "fp8_per_block", "lm_head": FP8}
    assert report_of(model).kept["model.layers.0.self_attn.q_proj"] == "no target matches"


def test_different_schemes_for_experts_and_linears(qwen: Path) -> None:
    model = load(qwen, scheme=None, moe=INT8, linear="fp8_per_tensor")
    assert model.get_submodule(EXPERTS).w13_codes.dtype == torch.int8
    assert model.model.layers[0].self_attn.q_proj.weight_codes.dtype == torch.float8_e4m3fn
    assert set(report_of(model).kernels) == {f"moe {INT8}", "linear fp8_per_tensor"}


@pytest.mark.usefixtures("nothing_allocated")
@pytest.mark.parametrize("argument", ["ignore", "targets"])
def test_a_pattern_that_matches_nothing(argument: str, qwen: Path) -> None:
    pattern = "model.layers.0.mlp.expert"
    value = [pattern] if argument == "ignore" else {pattern: INT8}
    with pytest.raises(PatternError, match=pattern) as caught:
        load(qwen, **{argument: value})
    assert EXPERTS in caught.value.hint


@pytest.mark.parametrize("pattern", ["*", "re:.*", "*lm_head", "re:lm_head|.*gate"])
def test_a_pattern_does_not_name_the_router_and_the_head(pattern: str, qwen: Path) -> None:
    model = load(qwen, targets={pattern: FP8, "re:.*experts": INT8})
    kept = report_of(model).kept
    assert kept["lm_head"] == "output embeddings"
    assert kept["model.layers.0.mlp.shared_expert_gate"] == "router"
    assert type(model.lm_head) is nn.Linear


def test_the_head_and_the_router_named_exactly(qwen: Path) -> None:
    gate = "model.layers.0.mlp.shared_expert_gate"
    model = load(qwen, targets={"lm_head": FP8, gate: FP8})
    assert quantized_layers(model) == {"lm_head", gate}
    assert model(torch.tensor([[5, 6]])).logits.isfinite().all()


def test_a_head_that_is_the_embedding_stays(save: Callable[[Architecture], Path]) -> None:
    """It is the embedding: nothing but an error can come of quantizing it."""
    architecture = BY_NAME["gemma4"]
    folder = save(architecture)
    with pytest.raises(ModelError, match="lm_head: shares its weight"):
        load(folder, architecture, targets={"lm_head": FP8})
    assert "lm_head" in report_of(load(folder, architecture, FP8)).kept


# What a checkpoint may look like


def test_shards_make_no_difference(save: Callable[..., Path], tmp_path: Path) -> None:
    whole = load(save(QWEN))
    folder = tmp_path / "shards"
    QWEN.model_class.from_pretrained(tmp_path).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same_state(load(folder), whole)


def test_with_and_without_a_head(qwen: Path, tmp_path: Path) -> None:
    """Names in checkpoint and model differ by a prefix, either way around. A head that is nowhere
    would be random numbers, and is refused."""
    whole = load(qwen, scheme=FP8)
    config = OnlineQuantizationConfig(FP8)
    headless = transformers.Qwen2MoeModel.from_pretrained(qwen, quantization_config=config)
    assert report_of(headless).coverage == 1.0
    assert_same_state(headless, whole.model)

    bare = transformers.Qwen2MoeModel.from_pretrained(qwen, dtype=torch.bfloat16)
    bare.save_pretrained(tmp_path / "bare")
    again = transformers.Qwen2MoeModel.from_pretrained(
        tmp_path / "bare", quantization_config=config
    )
    assert_same_state(again, whole.model)
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint.*lm_head\.weight"):
        load(tmp_path / "bare", scheme=FP8)


def test_a_missing_tensor_that_is_not_quantized_is_refused(
    save: Callable[[Architecture], Path],
) -> None:
    architecture = BY_NAME["qwen3_moe"]
    folder = save(architecture)
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.q_norm.weight"))
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_norm\.weight"):
        load(folder, architecture, INT8)


def test_layers_that_the_model_does_not_have(save: Callable[[Architecture], Path]) -> None:
    """Published checkpoints carry a layer more, for predicting several tokens at once."""
    architecture = BY_NAME["deepseek_v3"]
    folder = save(architecture)
    expected = load(folder, architecture, FP8)

    def add(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            tensors[name.replace(".layers.1.", ".layers.2.")] = tensors[name].clone()

    rewrite(folder, add)
    assert_same_state(load(folder, architecture, FP8), expected)


@pytest.mark.parametrize("scheme", [INT8, FP8])
def test_transformers_misses_nothing(scheme: str, qwen: Path) -> None:
    _, info = load(qwen, scheme=scheme, output_loading_info=True)
    assert not any(info.values()), info


# What is wrong with a checkpoint


def _missing(tensors: dict[str, Tensor]) -> None:
    del tensors[EXPERT_WEIGHT]


def _extra(tensors: dict[str, Tensor]) -> None:
    tensors[f"{EXPERTS}.4.gate_proj.weight"] = tensors[EXPERT_WEIGHT].clone()


def _misshapen(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT_WEIGHT] = tensors[EXPERT_WEIGHT][:-1].contiguous()


def _fp8(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT_WEIGHT] = tensors[EXPERT_WEIGHT].to(torch.float8_e4m3fn)


def _int8(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT_WEIGHT] = tensors[EXPERT_WEIGHT].to(torch.int8)


def _twice(tensors: dict[str, Tensor]) -> None:
    tensors[f"{EXPERTS}.gate_up_proj"] = torch.zeros(4, 48, 32, dtype=torch.bfloat16)


@pytest.mark.usefixtures("nothing_allocated")
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_missing, [EXPERTS, "1 tensors are missing", EXPERT_WEIGHT]),
        (_extra, ["model.safetensors", f"{EXPERTS}.4.gate_proj.weight", "has 4"]),
        (_misshapen, ["model.safetensors", EXPERT_WEIGHT, "[23, 32]", "[24, 32]"]),
        (_fp8, ["model.safetensors", EXPERT_WEIGHT, "float8_e4m3fn", "already quantized"]),
        (_int8, ["model.safetensors", EXPERT_WEIGHT, "int8"]),
        (_twice, ["model.safetensors", "second", EXPERTS]),
    ],
    ids=lambda value: getattr(value, "__name__", "").removeprefix("_"),
)
def test_a_bad_expert_is_found_before_anything_is_allocated(
    damage: Callable[[dict[str, Tensor]], None], says: list[str], qwen: Path
) -> None:
    rewrite(qwen, damage)
    for attempt in (load, lambda folder: moeq.load(folder, INT8)):
        with pytest.raises(CheckpointError) as caught:
            attempt(qwen)
        assert [words for words in says if words not in str(caught.value)] == []


@pytest.mark.usefixtures("nothing_allocated")
def test_a_missing_linear(qwen: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.self_attn.k_proj.weight"]

    rewrite(qwen, damage)
    with pytest.raises(
        CheckpointError, match=r"first: model\.layers\.1\.self_attn\.k_proj\.weight"
    ):
        load(qwen, scheme=FP8)


@pytest.mark.usefixtures("nothing_allocated")
def test_fused_experts_of_another_size(save: Callable[..., Path]) -> None:
    folder = save(QWEN, save_original_format=False)

    def damage(tensors: dict[str, Tensor]) -> None:
        name = f"{EXPERTS}.gate_up_proj"
        tensors[name] = tensors[name].transpose(1, 2).contiguous()

    rewrite(folder, damage)
    with pytest.raises(CheckpointError, match=r"shape \[4, 32, 48\], expected \[4, 48, 32\]"):
        load(folder)


@pytest.mark.usefixtures("nothing_allocated")
def test_a_missing_shard(save: Callable[..., Path]) -> None:
    folder = save(QWEN, max_shard_size="40KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        moeq.load(folder, INT8)


@pytest.mark.usefixtures("nothing_allocated")
def test_pickled_weights(qwen: Path) -> None:
    tensors = load_file(qwen / "model.safetensors")
    (qwen / "model.safetensors").unlink()
    torch.save(tensors, qwen / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only as pickle"):
        moeq.load(qwen, INT8)
    with pytest.raises(CheckpointError, match=r"from safetensors files.*pytorch_model\.bin"):
        load(qwen)


@pytest.mark.usefixtures("nothing_allocated")
def test_a_git_lfs_pointer(qwen: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123456\n"
    (qwen / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a git-lfs pointer") as caught:
        moeq.load(qwen, INT8)
    assert "git lfs pull" in caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", [INT8, "fp8_per_tensor", "fp8_per_block"])
def test_one_bad_number_ends_the_load(scheme: str, value: float, qwen: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[EXPERT_WEIGHT][7, 5] = value
        tensors[EXPERT_WEIGHT][9, 1] = value

    rewrite(qwen, damage)
    before = open_files()
    with pytest.raises(NonFiniteError) as caught:
        load(qwen, scheme=scheme)
    for words in (EXPERT_WEIGHT, str(value), "[7, 5]", "2 of 768"):
        assert words in str(caught.value)
    assert open_files() == before


def test_a_bad_number_in_stacked_experts_is_told_by_expert(
    save: Callable[[Architecture], Path],
) -> None:
    architecture = BY_NAME["gpt_oss"]
    folder = save(architecture)
    weight, bias = (
        f"{architecture.experts[1]}.{name}" for name in ("down_proj", "gate_up_proj_bias")
    )

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[weight][2, 5, 7] = float("nan")  # [E, in, out]

    def more_damage(tensors: dict[str, Tensor]) -> None:
        tensors[weight][2, 5, 7] = 0
        tensors[bias][3, 9] = float("-inf")  # gate and up alternate: the fifth of up

    rewrite(folder, damage)
    with pytest.raises(NonFiniteError, match=rf"{weight}, down of expert 2: nan at \[7, 5\]"):
        load(folder, architecture)
    rewrite(folder, more_damage)
    with pytest.raises(NonFiniteError, match=rf"{bias}, up of expert 3: -inf at \[4\]"):
        load(folder, architecture)


def test_a_bad_number_in_a_linear(qwen: Path) -> None:
    name = "model.layers.0.mlp.shared_expert.down_proj.weight"

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name][0, 0] = float("nan")

    rewrite(qwen, damage)
    with pytest.raises(NonFiniteError, match=name):
        load(qwen, scheme=FP8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_dtype_of_the_checkpoint_does_not_matter(dtype: torch.dtype, tmp_path: Path) -> None:
    """These weights are numbers of every dtype, so all checkpoints must give the same codes."""
    model = QWEN.make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 256).round() / 256)
    codes = []
    for name, kind in (("one", torch.bfloat16), ("two", dtype)):
        model.to(kind).save_pretrained(tmp_path / name)
        loaded = load(tmp_path / name, dtype=torch.float32)
        codes.append(loaded.get_submodule(EXPERTS).state_dict())
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])


def test_experts_stored_the_other_way_around(save: Callable[[Architecture], Path]) -> None:
    """Qwen3-VL's published checkpoints are [E, in, out], those that transformers saves are not;
    it tells them apart by their shapes, and so do we."""
    architecture = BY_NAME["qwen3_vl_moe"]
    folder = save(architecture)

    def codes() -> dict[str, Tensor]:
        model = load(folder, architecture)
        return {name: t for name, t in model.state_dict().items() if ".experts." in name}

    def turn(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if ".experts." in name:
                tensors[name] = tensors[name].transpose(1, 2).contiguous()

    expected = codes()
    rewrite(folder, turn)
    found = codes()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


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
    assert len(seen) > 24  # four experts of three projections in two layers
    assert {total for _, total in seen} == {done[-1]} == {report_of(model).total_bytes_before}


def test_load_takes_a_config_or_json(qwen: Path) -> None:
    config = OnlineQuantizationConfig(INT8, ignore=[EXPERTS])
    as_json = json.dumps({"quantization": INT8, "ignore": [EXPERTS]})
    for quantization in (config, as_json):
        model = moeq.load(qwen, quantization, dtype=torch.float32)
        assert quantization_of(model) == config
        assert model.dtype == torch.float32


def test_load_of_what_moeq_saved(qwen: Path, tmp_path: Path) -> None:
    moeq.load(qwen, INT8).save_pretrained(tmp_path / "saved")
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


@pytest.mark.parametrize("text", ["", "[]", "{", "7", '{"hidden_size": 8}'])
def test_load_refuses_what_is_no_config(text: str, qwen: Path) -> None:
    (qwen / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="not the config of a model"):
        moeq.load(qwen, INT8)


def test_a_saved_checkpoint_with_a_scale_missing(qwen: Path, tmp_path: Path) -> None:
    moeq.load(qwen, INT8).save_pretrained(tmp_path / "saved")

    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{EXPERTS}.w2_scale"]

    rewrite(tmp_path / "saved", drop)
    with pytest.raises(CheckpointError, match=rf"{EXPERTS}\.w2_scale: missing"):
        moeq.load(tmp_path / "saved")


def test_a_saved_checkpoint_of_another_scheme(qwen: Path, tmp_path: Path) -> None:
    """Codes of int8 read as fp8 would be a model of noise."""
    moeq.load(qwen, INT8).save_pretrained(tmp_path / "saved")
    config = quantization_of(moeq.load(tmp_path / "saved")).to_dict()
    amend(tmp_path / "saved", {"quantization_config": config | {"moe": FP8}})
    with pytest.raises(CheckpointError, match=r"int8.*expected torch\.float8_e4m3fn"):
        moeq.load(tmp_path / "saved")


@pytest.mark.parametrize(
    "kwargs", [{"max_shard_size": "30KB"}, {"save_original_format": False}], ids=str
)
def test_ways_to_save(kwargs: dict[str, Any], qwen: Path, tmp_path: Path) -> None:
    model = load(qwen, scheme=FP8)
    for folder in (tmp_path / "once", tmp_path / "twice"):
        model.save_pretrained(folder, **kwargs)
        again = QWEN.model_class.from_pretrained(folder)
        assert_same_state(again, model)
        model = again


@pytest.mark.parametrize("choice", [{"ignore": [EXPERTS]}, {"targets": {EXPERTS: "fp8_per_block"}}])
def test_saving_what_is_quantized_in_part(
    choice: dict[str, Any], qwen: Path, tmp_path: Path
) -> None:
    """The other layer's experts go back to what the hub has: a tensor each."""
    model = load(qwen, **choice)
    model.save_pretrained(tmp_path / "saved")
    other = set(QWEN.experts) - quantized_layers(model)
    assert f"{other.pop()}.0.gate_proj.weight" in load_file(
        tmp_path / "saved" / "model.safetensors"
    )
    again = QWEN.model_class.from_pretrained(tmp_path / "saved")
    assert_same_state(again, model)
    assert quantization_of(again) == quantization_of(model)


def test_a_saved_checkpoint_in_another_dtype(qwen: Path, tmp_path: Path) -> None:
    """Activations and what is not quantized change, codes and scales do not."""
    model = load(qwen, scheme=FP8)
    model.save_pretrained(tmp_path / "saved")
    again = QWEN.model_class.from_pretrained(tmp_path / "saved", dtype=torch.float32)
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
    assert report.kept["model.layers.0.self_attn.q_proj"] == "the scheme leaves linear layers alone"
    assert report.peak_bytes_planned > report.total_bytes_after
    assert report.peak_bytes_actual is None or report.peak_bytes_actual >= 0
    assert 0 < report.seconds < 60
    assert any("100% of expert weights" in line for line in report.lines())


def test_only_our_models_have_a_report(qwen: Path) -> None:
    for model in (nn.Linear(2, 2), QWEN.model_class.from_pretrained(qwen)):
        for ask in (report_of, quantization_of):
            with pytest.raises(ModelError, match="not quantized by moeq"):
                ask(model)


# What runs


def test_no_graph_break(qwen: Path) -> None:
    """One op for a whole layer: what compiles around it sees no Python loop over experts."""
    model = load(qwen, scheme=FP8, dtype=torch.float32)
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        found = compiled(ids, use_cache=False).logits
    assert torch.equal(found, expected)


def test_a_gate_of_its_own_compiles_too(save: Callable[[Architecture], Path]) -> None:
    model = load(save(BY_NAME["gpt_oss"]), BY_NAME["gpt_oss"], dtype=torch.float32)
    experts = model.get_submodule(BY_NAME["gpt_oss"].experts[0])
    inputs = torch.randn(5, 160), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    with torch.no_grad():
        expected = experts(*inputs)
        torch._dynamo.reset()
        found = torch.compile(experts, fullgraph=True, backend="eager")(*inputs)
    assert torch.equal(found, expected)


def test_no_gradients(qwen: Path) -> None:
    model = load(qwen)
    assert not any(p.requires_grad for p in model.get_submodule(EXPERTS).parameters())


@pytest.mark.parametrize("scheme", [INT8, FP8])
def test_a_cast_is_refused(scheme: str, qwen: Path) -> None:
    """fp8 codes are floating-point tensors to PyTorch: `.to(dtype)` would rewrite them."""
    model = load(qwen, scheme=scheme)
    with pytest.raises(ModelError, match="dtype of a quantized model"):
        model.get_submodule(EXPERTS).to(torch.float16)
    assert_same_state(model.to("cpu"), load(qwen, scheme=scheme))


def test_a_model_can_be_copied_and_is_freed(qwen: Path) -> None:
    model = load(qwen, scheme=FP8)
    twin = copy.deepcopy(model)
    assert_same_state(twin, model)
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    codes = weakref.ref(model.get_submodule(EXPERTS).w13_codes)
    gc.collect()
    gc.disable()
    try:
        del model
        assert codes() is None  # at once, not when the garbage collector comes around
    finally:
        gc.enable()
    assert torch.equal(twin(ids).logits, expected)


# How much memory a load takes

_MEASURE = """
import sys, threading, torch, transformers
from moeq import OnlineQuantizationConfig
from moeq.report import anonymous_bytes

config = OnlineQuantizationConfig(sys.argv[2])
config.quant_method  # imports and registers the engine
transformers.logging.disable_progress_bar()
kind = transformers.Qwen3MoeForCausalLM
torch.set_num_threads(1)
before, peak, stop = anonymous_bytes(), 0, threading.Event()

def watch():
    global peak
    while not stop.wait(0.001):
        peak = max(peak, anonymous_bytes())

thread = threading.Thread(target=watch)
thread.start()
model = kind.from_pretrained(sys.argv[1], quantization_config=config)
stop.set()
thread.join()
final = sum(p.nbytes for p in model.parameters())
print(final, max(peak, anonymous_bytes()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure with")
def test_loading_takes_little_more_than_the_final_model(tmp_path: Path) -> None:
    """302 MB of experts in bf16, in both layouts; stock transformers takes 390 MB for the first."""
    processes = []
    for layout in ("per expert", "fused"):
        folder = tmp_path / layout
        write_large_checkpoint(folder, fused=layout == "fused")
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", _MEASURE, str(folder), INT8],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        final, peak = map(int, stdout.split())
        assert final < 160e6
        assert peak <= final + 64e6


def write_large_checkpoint(folder: Path, *, fused: bool) -> None:
    """A Qwen3-MoE of six layers of 64 experts, whose weights are one block again and again."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=64,
        num_experts_per_tok=2,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = transformers.Qwen3MoeForCausalLM(config).state_dict()
    header, end = {}, 0
    for name, parameter in shapes.items():
        tensors = {name: parameter.shape}
        if not fused and name.rpartition(".")[0].endswith("experts"):
            tensors = split_experts(name, parameter.shape)
        for tensor, shape in tensors.items():
            offsets = [end, end := end + 2 * math.prod(shape)]
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
    assert end > 302e6
    block = torch.randn(1 << 20).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])


def split_experts(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the hub has instead of a fused parameter."""
    module, _, parameter = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)
    num_experts, rows, columns = shape
    return {
        f"{module}.{expert}.{part}.weight": (rows // len(parts), columns)
        for expert in range(num_experts)
        for part in parts
    }


def open_files() -> set[str]:
    """What this process holds open, where the system says."""
    folder = Path("/proc/self/fd")
    if not folder.exists():
        return set()
    targets = set()
    for link in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor is gone again
            targets.add(link.readlink().name)
    return {target for target in targets if target.endswith(".safetensors")}
