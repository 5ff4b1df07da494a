"""Which layers are found, which are chosen, and what is refused because it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moeq import report_of
from moeq.errors import (
    ModelError,
    PatternError,
)
from tests.engines.models import BY_NAME, Architecture
from tests.engines.tools import (
    EXPERTS,
    FP8,
    INT8,
    QWEN,
    load,
    quantized_layers,
)

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


# What is found


@UNREACHABLE
@pytest.mark.usefixtures("nothing_allocated")
@pytest.mark.parametrize("scheme", [INT8, FP8])
def test_experts_out_of_reach_are_an_error(
    architecture: Architecture, scheme: str, save: Callable[[Architecture], Path]
) -> None:
    with pytest.raises(ModelError, match=architecture.experts[0]) as caught:
        load(save(architecture), architecture, scheme)
    assert f"add '{architecture.experts[0]}' to ignore" in caught.value.hint


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
    assert 'set moe to "none"' in caught.value.hint


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


@pytest.mark.parametrize("pattern", ["*", "re:.*", "re:lm_head|.*gate"])
def test_a_pattern_does_not_name_the_router_and_the_head(pattern: str, qwen: Path) -> None:
    model = load(qwen, targets={pattern: FP8, "re:.*experts": INT8})
    kept = report_of(model).kept
    assert kept["lm_head"] == "output embeddings"
    assert kept["model.layers.0.mlp.shared_expert_gate"] == "router"
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("pattern", ["*lm_head", "*norm*"])
def test_a_target_that_can_quantize_nothing_is_refused(pattern: str, qwen: Path) -> None:
    with pytest.raises(PatternError, match="no layer that can be quantized"):
        load(qwen, targets={pattern: FP8, "re:.*experts": INT8})


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
