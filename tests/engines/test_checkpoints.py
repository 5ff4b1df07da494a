"""What a checkpoint may look like, and what is wrong with one: said before memory is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

import moeq
from moeq import OnlineQuantizationConfig, report_of
from moeq.cli import cli
from moeq.engines.offline import quantize_checkpoint
from moeq.errors import (
    CheckpointError,
    NonFiniteError,
)
from tests.engines.models import BY_NAME, Architecture
from tests.engines.tools import (
    EXPERT_WEIGHT,
    EXPERTS,
    FP8,
    INT8,
    QWEN,
    amend,
    assert_same_state,
    load,
    open_files,
    rewrite,
)

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
    amend(folder, {"num_nextn_predict_layers": 0})
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\..*would be dropped"):
        load(folder, architecture, FP8)
    amend(folder, {"num_nextn_predict_layers": 1})
    assert_same_state(load(folder, architecture, FP8), expected)


def test_what_models_compute_may_be_there(qwen: Path) -> None:
    """Checkpoints of some years ago hold the frequencies of rotary embeddings."""
    expected = load(qwen)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(qwen, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert_same_state(load(qwen), expected)


def test_a_class_that_takes_a_part_takes_a_part(qwen: Path) -> None:
    """Only what config.json names must take everything."""
    rewrite(qwen, lambda tensors: tensors.update({"vision.weight": torch.ones(4)}))
    with pytest.raises(CheckpointError, match=r"vision\.weight"):
        load(qwen)
    amend(qwen, {"architectures": ["Qwen2MoeVisionModel"]})
    assert report_of(load(qwen)).coverage == 1.0


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
        (_missing, [EXPERTS, "missing from the checkpoint", EXPERT_WEIGHT]),
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
        CheckpointError,
        match=r"missing from the checkpoint: model\.layers\.1\.self_attn\.k_proj\.weight",
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
def test_pickled_weights(qwen: Path) -> None:
    tensors = load_file(qwen / "model.safetensors")
    (qwen / "model.safetensors").unlink()
    torch.save(tensors, qwen / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only as pickle"):
        moeq.load(qwen, INT8)
    with pytest.raises(CheckpointError, match=r"from safetensors files.*pytorch_model\.bin"):
        load(qwen)


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


def _attention_as_codes(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def _norm_of_another_size(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_attention_as_codes, "model.layers.0.self_attn.q_proj.weight"),
        (_norm_of_another_size, "model.norm.weight"),
    ],
)
def test_what_stays_unquantized_is_looked_at_too(
    change: Callable[[dict[str, Tensor]], None], name: str, qwen: Path, nothing_allocated: None
) -> None:
    rewrite(qwen, change)
    with pytest.raises(CheckpointError, match=name):
        load(qwen)


@pytest.mark.parametrize("top_k", [0, -1, 99])
def test_more_experts_per_token_than_there_are(
    top_k: int, qwen: Path, nothing_allocated: None
) -> None:
    amend(qwen, {"num_experts_per_tok": top_k})
    with pytest.raises(CheckpointError, match="num_experts_per_tok"):
        load(qwen)


def test_tensors_without_a_place_are_dropped_where_the_user_says_so(
    qwen: Path, tmp_path: Path
) -> None:
    expected = load(qwen, QWEN, INT8)
    rewrite(qwen, lambda tensors: tensors.update({"model.surprise.weight": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"model\.surprise\.weight.*no tensor of"):
        load(qwen, QWEN, INT8)
    config = OnlineQuantizationConfig(INT8, strict=False)
    model = moeq.load(qwen, config)
    assert_same_state(model, expected)
    (note,) = [note for note in report_of(model).notes if "dropped" in note]
    assert "model.surprise.weight" in note
    quantize_checkpoint(qwen, config, tmp_path / "out")
    assert_same_state(moeq.load(tmp_path / "out"), expected)
    words = ["quantize", str(qwen), "-q", INT8, "--no-strict", "--out", str(tmp_path / "cli")]
    result = CliRunner().invoke(cli, words)
    assert "dropped  model.surprise.weight" in result.stdout
