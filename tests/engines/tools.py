"""What tests of the transformers engine share: its standard model, and hands to break it with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moeq import OnlineQuantizationConfig
from moeq.checkpoint.folder import checkpoint_files
from moeq.checkpoint.writer import MANIFEST_NAME
from tests.engines.models import BY_NAME, Architecture

INT8 = "int8_per_channel_weight_only"
FP8 = "fp8_per_channel"
INT4 = "int4_per_group_weight_only"

QWEN = BY_NAME["qwen2_moe"]
"""Per expert on disk, a shared expert, and a gate for that which is an `nn.Linear`."""
EXPERTS = QWEN.experts[0]
EXPERT_WEIGHT = f"{EXPERTS}.3.gate_proj.weight"


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
    (file,) = checkpoint_files(folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / MANIFEST_NAME).unlink(missing_ok=True)


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
