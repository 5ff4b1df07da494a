"""Tiny models of the MoE architectures of transformers, one row each.

A row says in the tests' own words how an architecture lays out its experts, so that nothing which
the engine reads off a module is taken for granted. Sizes are about as small as the classes allow;
the odd ones are on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

VOCABULARY = 96

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Architecture:
    """One row.

    Attributes:
        name: of the model's type.
        config: its class in transformers.
        model: its class in transformers.
        arguments: of the config, over `_COMMON`.
        experts: experts modules.
        per_expert: whether the hub's checkpoints hold a tensor per expert, and not one per layer.
        is_gated: whether experts have a gate beside up.
        transposed: whether the module stores [E, in, out].
        interleaved: whether the module alternates gate and up.
        has_bias: whether experts have biases.
        kept: linears that a scheme for linears leaves alone beside the output embeddings, because
            they route, transformers keeps them in fp32, or merges or splits tensors to make them:
            ends of names.
        since: the transformers in which its experts became modules of the shared kind.
        bf16_since: the transformers that first ran it in bf16.
    """

    name: str
    config: str
    model: str
    arguments: dict[str, Any]
    experts: tuple[str, ...]
    per_expert: bool = True
    is_gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    has_bias: bool = False
    kept: tuple[str, ...] = ()
    since: str = ""
    bf16_since: str = ""

    @property
    def missing(self) -> str:
        """Why this transformers does not have it, or nothing."""
        absent = [name for name in (self.config, self.model) if not hasattr(transformers, name)]
        if absent:
            return f"transformers {transformers.__version__} has no {absent[0]}"
        if _is_older_than(self.since):
            return f"its experts have the shared layout since transformers {self.since}"
        return ""

    @property
    def half_dtype(self) -> torch.dtype:
        """bf16, or fp32 where transformers itself cannot run the model in bf16."""
        return torch.float32 if _is_older_than(self.bf16_since) else torch.bfloat16

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.model)

    def make(self) -> Any:
        """A model in fp32 whose every matrix is large enough to show in what it computes.

        As transformers initializes them (std 0.02), two layers change the logits so little that a
        wrong expert could hide.
        """
        torch.manual_seed(0)
        arguments = self.arguments if "text_config" in self.arguments else _COMMON | self.arguments
        model = self.model_class(getattr(transformers, self.config)(**arguments)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 or name.endswith("_bias"):
                    parameter.normal_(0, 0.15)
        return model


def _is_older_than(version: str) -> bool:
    numbers = [int(number) for number in transformers.__version__.split(".")[:2]]
    return bool(version) and numbers < [int(number) for number in version.split(".")]


def _layers(path: str, *indices: int) -> tuple[str, ...]:
    return tuple(path.format(index) for index in indices)


_MLP = "model.layers.{}.mlp.experts"
_SIZES = {"intermediate_size": 40, "moe_intermediate_size": 24}
_TOP2_OF_4 = {"num_experts": 4, "num_experts_per_tok": 2}
_TOP2_OF_4_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_TOP2_OF_4_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2}
_GROUPS = {"n_group": 2, "topk_group": 1}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_DSA = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
_DEEPSEEK = (
    _SIZES
    | _MLA
    | _TOP2_OF_4_ROUTED
    | _GROUPS
    | {"first_k_dense_replace": 1, "n_shared_experts": 1}
)
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_QWEN_NEXT = (
    _TOP2_OF_4
    | _LINEAR_ATTENTION
    | {"head_dim": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
)
_NEMOTRON = (
    _SIZES
    | _TOP2_OF_4_ROUTED
    | {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "head_dim": 8,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 24,
    }
)
_INKLING = (
    _SIZES
    | _TOP2_OF_4_ROUTED
    | {
        "head_dim": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": 8,
        "d_rel": 4,
        "rel_extent": 16,
        "unpadded_vocab_size": VOCABULARY,
    }
)

ARCHITECTURES = (
    Architecture(
        "mixtral",
        "MixtralConfig",
        "MixtralForCausalLM",
        _TOP2_OF_4_LOCAL | {"intermediate_size": 24},
        _layers(_MLP, 0, 1),
    ),
    Architecture(
        "qwen2_moe",
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        _SIZES | _TOP2_OF_4 | {"shared_expert_intermediate_size": 24},
        _layers(_MLP, 0, 1),
        kept=("shared_expert_gate",),
    ),
    Architecture(
        # several 128-blocks a side, the last of them partial
        "qwen3_moe",
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        _TOP2_OF_4
        | {
            "hidden_size": 160,
            "intermediate_size": 40,
            "moe_intermediate_size": 144,
            "head_dim": 8,
            "num_experts": 8,
        },
        _layers(_MLP, 0, 1),
    ),
    Architecture(
        "qwen3_next",
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        _QWEN_NEXT,
        _layers(_MLP, 0, 1),
        kept=("shared_expert_gate",),
    ),
    Architecture(
        "qwen3_5_moe",
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        _QWEN_NEXT,
        _layers(_MLP, 0, 1),
        kept=("shared_expert_gate",),
    ),
    Architecture(
        "qwen3_vl_moe",
        "Qwen3VLMoeConfig",
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": _COMMON | _SIZES | _TOP2_OF_4 | {"head_dim": 8},
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        },
        _layers("model.language_model.layers.{}.mlp.experts", 0, 1),
        per_expert=False,
    ),
    Architecture(
        "olmoe", "OlmoeConfig", "OlmoeForCausalLM", _TOP2_OF_4 | _SIZES, _layers(_MLP, 0, 1)
    ),
    Architecture(
        "flex_olmo",
        "FlexOlmoConfig",
        "FlexOlmoForCausalLM",
        _TOP2_OF_4 | _SIZES,
        _layers(_MLP, 0, 1),
    ),
    Architecture(
        "deepseek_v2",
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        _DEEPSEEK | {"topk_method": "group_limited_greedy"},
        _layers(_MLP, 1),
    ),
    Architecture(
        "deepseek_v3", "DeepseekV3Config", "DeepseekV3ForCausalLM", _DEEPSEEK, _layers(_MLP, 1)
    ),
    Architecture(
        "deepseek_v32",
        "DeepseekV32Config",
        "DeepseekV32ForCausalLM",
        _DEEPSEEK | _DSA,
        _layers(_MLP, 1),
        kept=("indexer.weights_proj",),
    ),
    Architecture(
        "deepseek_v4",
        "DeepseekV4Config",
        "DeepseekV4ForCausalLM",
        _TOP2_OF_4_ROUTED
        | {
            "moe_intermediate_size": 24,
            "head_dim": 16,
            "num_key_value_heads": 1,
            "q_lora_rank": 16,
            "o_groups": 2,
            "o_lora_rank": 8,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_topk": 4,
            "sliding_window": 8,
        },
        _layers(_MLP, 0, 1),
        kept=("compressor.kv_proj", "compressor.gate_proj"),
        bf16_since="5.20",
    ),
    Architecture(
        "glm4_moe",
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        _SIZES
        | _TOP2_OF_4_ROUTED
        | {"head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1},
        _layers(_MLP, 1),
    ),
    Architecture(
        "glm4_moe_lite",
        "Glm4MoeLiteConfig",
        "Glm4MoeLiteForCausalLM",
        _SIZES | _MLA | _TOP2_OF_4_ROUTED | {"n_shared_experts": 1},
        _layers(_MLP, 1),
    ),
    Architecture(
        "glm_moe_dsa",
        "GlmMoeDsaConfig",
        "GlmMoeDsaForCausalLM",
        _SIZES | _MLA | _TOP2_OF_4_ROUTED | _DSA | {"mlp_layer_types": ["dense", "sparse"]},
        _layers(_MLP, 1),
        kept=("indexer.weights_proj",),
    ),
    Architecture(
        "gpt_oss",
        "GptOssConfig",
        "GptOssForCausalLM",
        _TOP2_OF_4_LOCAL | {"hidden_size": 160, "intermediate_size": 144, "head_dim": 8},
        _layers(_MLP, 0, 1),
        per_expert=False,
        transposed=True,
        interleaved=True,
        has_bias=True,
    ),
    Architecture(
        "openai_privacy_filter",
        "OpenAIPrivacyFilterConfig",
        "OpenAIPrivacyFilterForTokenClassification",
        _TOP2_OF_4_LOCAL | {"intermediate_size": 24, "head_dim": 8},
        _layers(_MLP, 0, 1),
        per_expert=False,
        transposed=True,
        has_bias=True,
    ),
    Architecture(
        "granitemoe",
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        _TOP2_OF_4_LOCAL | {"intermediate_size": 24},
        _layers("model.layers.{}.block_sparse_moe.experts", 0, 1),
        per_expert=False,
    ),
    Architecture(
        "granitemoehybrid",
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        _TOP2_OF_4_LOCAL
        | {
            "intermediate_size": 24,
            "shared_intermediate_size": 24,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
        _layers("model.layers.{}.block_sparse_moe.experts", 0, 1),
        per_expert=False,
    ),
    Architecture(
        "aria",
        "AriaTextConfig",
        "AriaTextForCausalLM",
        {"intermediate_size": 24, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        _layers(_MLP, 0, 1),
        per_expert=False,
        transposed=True,
        since="5.18",
    ),
    Architecture(
        "nemotron_h",
        "NemotronHConfig",
        "NemotronHForCausalLM",
        _NEMOTRON,
        _layers("model.layers.{}.mixer.experts", 1, 3),
        is_gated=False,
    ),
    Architecture(
        "nemotron_h_latent",
        "NemotronHConfig",
        "NemotronHForCausalLM",
        _NEMOTRON | {"moe_latent_size": 16},
        _layers("model.layers.{}.mixer.experts", 1, 3),
        is_gated=False,
    ),
    Architecture(
        "gemma4",
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        _SIZES
        | {
            "head_dim": 8,
            "global_head_dim": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        _layers("model.layers.{}.experts", 0, 1),
        per_expert=False,
        kept=("router.proj",),
    ),
    Architecture(
        "jamba",
        "JambaConfig",
        "JambaForCausalLM",
        _TOP2_OF_4
        | {
            "intermediate_size": 24,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
        _layers("model.layers.{}.feed_forward.experts", 1),
        kept=("feed_forward.router",),
    ),
    Architecture(
        "minimax",
        "MiniMaxConfig",
        "MiniMaxForCausalLM",
        _TOP2_OF_4_LOCAL | {"intermediate_size": 24, "head_dim": 8, "block_size": 8},
        _layers(_MLP, 0, 1),
    ),
    Architecture(
        "minimax_m2",
        "MiniMaxM2Config",
        "MiniMaxM2ForCausalLM",
        _TOP2_OF_4_LOCAL | {"intermediate_size": 24, "head_dim": 8},
        _layers(_MLP, 0, 1),
    ),
    Architecture(
        "minimax_m3_vl",
        "MiniMaxM3VLConfig",
        "MiniMaxM3SparseForConditionalGeneration",
        {
            "text_config": _COMMON
            | _SIZES
            | _TOP2_OF_4_LOCAL
            | {
                "head_dim": 8,
                "mlp_layer_types": ["dense", "sparse"],
                "dense_intermediate_size": 24,
                "shared_intermediate_size": 24,
                "index_head_dim": 8,
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
            },
            "projector_hidden_size": 16,
        },
        _layers("model.language_model.layers.{}.mlp.experts", 1),
        kept=("mlp.gate_up_proj", "shared_experts.gate_up_proj"),
    ),
    Architecture(
        # position embeddings [4, 4, 16] for 4 experts
        "kimi_k25",
        "Kimi_K25Config",
        "Kimi_K25ForConditionalGeneration",
        {
            "text_config": _COMMON | _DEEPSEEK | {"model_type": "deepseek_v3"},
            "vision_config": {
                "pos_emb_height": 4,
                "pos_emb_width": 4,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
            },
            "projection_hidden_size": 16,
        },
        _layers("model.language_model.layers.{}.mlp.experts", 1),
        kept=(".attn.q_proj", ".attn.k_proj", ".attn.v_proj"),
    ),
    Architecture(
        "ernie4_5_moe",
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        _SIZES | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
        _layers(_MLP, 1),
    ),
    Architecture(
        "phimoe",
        "PhimoeConfig",
        "PhimoeForCausalLM",
        _TOP2_OF_4_LOCAL | {"intermediate_size": 24},
        _layers(_MLP, 0, 1),
    ),
    Architecture(
        "hunyuan_v1_moe",
        "HunYuanMoEV1Config",
        "HunYuanMoEV1ForCausalLM",
        {"num_experts": 4, "moe_topk": 2, "intermediate_size": 24, "head_dim": 8},
        _layers(_MLP, 0, 1),
        kept=("gate.wg",),
    ),
    Architecture(
        "hy_v3",
        "HYV3Config",
        "HYV3ForCausalLM",
        _SIZES | _TOP2_OF_4 | {"head_dim": 8, "num_shared_experts": 1, "first_k_dense_replace": 1},
        _layers(_MLP, 1),
    ),
    Architecture(
        "lfm2_moe",
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        _SIZES | _TOP2_OF_4 | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        _layers("model.layers.{}.feed_forward.experts", 1),
    ),
    Architecture(
        "dots1",
        "Dots1Config",
        "Dots1ForCausalLM",
        _SIZES
        | _TOP2_OF_4_ROUTED
        | {"head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1},
        _layers(_MLP, 1),
    ),
    Architecture(
        "bailing_hybrid",
        "BailingHybridConfig",
        "BailingHybridForCausalLM",
        _SIZES
        | _TOP2_OF_4_LOCAL
        | _MLA
        | _GROUPS
        | {
            "first_k_dense_replace": 1,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
        _layers(_MLP, 1),
    ),
    Architecture(
        "kimi_linear",
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        _SIZES
        | _TOP2_OF_4_LOCAL
        | _MLA
        | {
            "q_lora_rank": None,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            "linear_head_dim": 8,
            "linear_num_heads": 4,
        },
        _layers(_MLP, 1),
    ),
    Architecture(
        "mistral4",
        "Mistral4Config",
        "Mistral4ForCausalLM",
        _SIZES | _MLA | _TOP2_OF_4_ROUTED | {"n_shared_experts": 1, "first_k_dense_replace": 0},
        _layers(_MLP, 0, 1),
        per_expert=False,
    ),
    Architecture(
        "zaya",
        "ZayaConfig",
        "ZayaForCausalLM",
        {
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "head_dim": 8,
            "router_hidden_size": 16,
        },
        _layers(_MLP, 0, 1),
        per_expert=False,
        kept=("gate.down_proj", "router_mlp.fc1", "router_mlp.fc2", "router_mlp.out_proj"),
    ),
    Architecture(
        "afmoe",
        "AfmoeConfig",
        "AfmoeForCausalLM",
        _SIZES | _TOP2_OF_4 | {"head_dim": 8, "num_dense_layers": 1, "num_shared_experts": 1},
        _layers(_MLP, 1),
        kept=("router.gate",),
    ),
    Architecture(
        "cohere2_moe",
        "Cohere2MoeConfig",
        "Cohere2MoeForCausalLM",
        _TOP2_OF_4 | {"intermediate_size": 24, "head_dim": 8, "num_shared_experts": 1},
        _layers(_MLP, 0, 1),
    ),
    Architecture(
        "exaone_moe",
        "ExaoneMoeConfig",
        "ExaoneMoeForCausalLM",
        _SIZES | _TOP2_OF_4 | {"first_k_dense_replace": 1, "num_shared_experts": 1},
        _layers(_MLP, 1),
    ),
    Architecture(
        "solar_open",
        "SolarOpenConfig",
        "SolarOpenForCausalLM",
        _SIZES | _TOP2_OF_4_ROUTED | {"head_dim": 8, "n_shared_experts": 1},
        _layers(_MLP, 0, 1),
    ),
    Architecture(
        "laguna",
        "LagunaConfig",
        "LagunaForCausalLM",
        _SIZES | _TOP2_OF_4 | {"head_dim": 8, "shared_expert_intermediate_size": 24},
        _layers(_MLP, 1),
    ),
    Architecture(
        "mimo_v2_flash",
        "MiMoV2FlashConfig",
        "MiMoV2FlashForCausalLM",
        _SIZES | _TOP2_OF_4_ROUTED | {"head_dim": 8, "v_head_dim": 8},
        _layers(_MLP, 1),
    ),
    Architecture(
        "inkling",
        "InklingTextConfig",
        "InklingForCausalLM",
        _INKLING,
        _layers(_MLP, 0, 1),
        per_expert=False,
    ),
    Architecture(
        "inkling2",
        "Inkling2TextConfig",
        "Inkling2ForCausalLM",
        _INKLING,
        _layers(_MLP, 0, 1),
        per_expert=False,
    ),
    Architecture(
        "beam",
        "BeamConfig",
        "BeamForCausalLM",
        _SIZES | _TOP2_OF_4 | _GROUPS | {"head_dim": 8, "mlp_layer_types": ["dense", "sparse"]},
        _layers(_MLP, 1),
    ),
    Architecture(
        "muse_spark",
        "MuseSparkTextConfig",
        "MuseSparkTextModel",
        _SIZES | _TOP2_OF_4_LOCAL | {"head_dim": 8, "moe_hidden_size": 16, "sliding_window": 8},
        _layers("layers.{}.mlp.experts", 0, 1),
        per_expert=False,
    ),
)

BY_NAME = {row.name: row for row in ARCHITECTURES}
