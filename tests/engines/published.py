"""Tiny checkpoints that are published quantized, and the bf16 ones that they stand for.

Codes and scales are random, so nothing here quantizes; what they mean is written down once more, as
plainly as possible, and held against transformers' own decoding where that can.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from tests.engines.models import BY_NAME, Architecture

Tensors = dict[str, Tensor]

GPT_OSS = replace(
    BY_NAME["gpt_oss"],
    arguments=BY_NAME["gpt_oss"].arguments | {"hidden_size": 160, "intermediate_size": 96},
)
"""Five blocks of 32 in a row of gate and up, three in one of down."""

DEEPSEEK = replace(
    BY_NAME["deepseek_v3"],
    arguments=BY_NAME["deepseek_v3"].arguments
    | {"hidden_size": 192, "intermediate_size": 128, "moe_intermediate_size": 144},
)
"""Blocks of 128 that are whole, and cut off in rows, in columns and in both."""

_E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


@dataclass(frozen=True)
class Published:
    """A way to publish.

    Attributes:
        architecture: of the model.
        quantization: what config.json says.
        encode: a state dict as published, and as it is decoded.
    """

    architecture: Architecture
    quantization: dict[str, Any]
    encode: Callable[[Tensors], tuple[Tensors, Tensors]]

    def write(self, folder: Path, **kwargs: Any) -> tuple[Path, Path]:
        """(the published checkpoint, the bf16 one)."""
        model = self.architecture.make().to(torch.bfloat16)
        original = folder / "original"
        model.save_pretrained(original, **kwargs)
        (file,) = original.glob("*.safetensors")
        stored, decoded = self.encode(transformers.modeling_utils.load_state_dict(file))
        save_file(decoded, file, metadata={"format": "pt"})
        published = folder / "published"
        shutil.copytree(original, published)
        save_file(stored, published / file.name, metadata={"format": "pt"})
        config = json.loads((original / "config.json").read_text())
        config["quantization_config"] = self.quantization
        (published / "config.json").write_text(json.dumps(config))
        return published, original


def mxfp4(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Fused experts [E, K, N] as blocks and scales."""
    torch.manual_seed(1)
    stored, decoded = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")) or tensor.ndim != 3:
            continue
        e, k, n = tensor.shape
        nibbles = torch.randint(0, 16, (e, n, k // 32, 32))
        scales = torch.randint(119, 124, (e, n, k // 32))
        scales[0, :2, 0] = torch.tensor([0, 1])  # subnormals
        del stored[name]
        stored[f"{name}_blocks"] = (nibbles[..., 0::2] + 16 * nibbles[..., 1::2]).to(torch.uint8)
        stored[f"{name}_scales"] = scales.to(torch.uint8)
        values = torch.tensor(_E2M1, dtype=torch.float64)[nibbles]
        values *= 2.0 ** (scales[..., None] - 127).double()
        decoded[name] = values.flatten(2).mT.to(torch.bfloat16).contiguous()
    return stored, decoded


def fp8_blocks(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Every linear but router and head as codes and a scale for 128 x 128."""
    torch.manual_seed(1)
    stored, decoded = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight") and "kv_a_proj" not in name and "q_a_" not in name:
            continue
        if tensor.ndim != 2:
            continue
        codes = (torch.randn(tensor.shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        n, k = tensor.shape
        scales = 0.0005 + 0.002 * torch.rand(-(n // -128), -(k // -128))
        stored[name], stored[f"{name}_scale_inv"] = codes, scales
        rows, columns = torch.arange(n) // 128, torch.arange(k) // 128
        decoded[name] = (codes.float() * scales[rows][:, columns]).to(torch.bfloat16)
    return stored, decoded


MXFP4 = Published(GPT_OSS, {"quant_method": "mxfp4"}, mxfp4)
FP8_BLOCKS = Published(
    DEEPSEEK,
    {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    fp8_blocks,
)
