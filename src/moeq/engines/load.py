"""`moeq.load`: what can be known of a folder before transformers opens it is checked first."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from moeq.checkpoint.headers import VARIANT, checkpoint_files
from moeq.checkpoint.hub import resolve_model
from moeq.checkpoint.writer import check_manifest
from moeq.config import QUANT_METHOD, OnlineQuantizationConfig
from moeq.engines.transformers import (
    MoeqHfQuantizer,
    Progress,
    register_with_transformers,
    reporting_to,
)
from moeq.errors import CheckpointError, ConfigError, ModelError
from moeq.memory import without_collections
from moeq.report import LoadReport
from moeq.schemes import OnlineQuantScheme

_LOCK = threading.Lock()

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
)


def load(
    model: str | Path,
    quantization: str | OnlineQuantizationConfig | None = None,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    **kwargs: Any,
) -> Any:
    """Load a model quantized: `from_pretrained` behind checks that come before it.

    Args:
        model: a folder, or an id on the Hugging Face hub.
        quantization: a scheme's name or a config; None for a checkpoint that moeq saved.
        device: "cpu", "cuda", "cuda:1", ...; with a `distributed_config` every rank has the one
            that transformers binds it to.
        progress: called with bytes read so far and bytes to read.
        kwargs: for `from_pretrained`.

    Returns:
        A transformers model; `report_of` says how it went.

    Raises:
        MoeqError: whatever is wrong with checkpoint, configuration or machine.
    """
    folder = resolve_model(model)
    entries = check_folder(folder)
    saved = entries.get("quantization_config") is not None
    config = None
    if quantization is not None:
        if saved:
            raise ConfigError(
                f"{folder} is already quantized by moeq", hint="load it without a scheme"
            )
        config = quantization
        if isinstance(quantization, str):
            config = OnlineQuantizationConfig.from_json(quantization)
    elif not saved:
        known = ", ".join(scheme.value for scheme in OnlineQuantScheme)
        raise ConfigError(
            f"{folder} is not quantized and no scheme is named", hint=f"name one of: {known}"
        )
    try:
        torch.device(device)
    except RuntimeError:
        raise ConfigError(f"unknown device {device!r}", hint="cpu, cuda, cuda:1, ...") from None
    register_with_transformers()
    # Two loads at once give wrong models: transformers changes global state while it builds one
    with _LOCK, reporting_to(progress), without_collections():
        if saved:
            kwargs = {"variant": VARIANT} | kwargs
        if all(kwargs.get(name) is None for name in ("distributed_config", "tp_plan", "tp_size")):
            kwargs["device_map"] = device
        return model_class(entries).from_pretrained(folder, quantization_config=config, **kwargs)


def check_folder(folder: Path) -> dict[str, Any]:
    """That a folder holds a model that moeq can start from, or has saved.

    Returns:
        Its config.json.

    Raises:
        CheckpointError: files missing, config not JSON, an unknown architecture, or quantized by
            somebody else.
    """
    checkpoint_files(folder)
    check_manifest(folder)
    return check_config(folder)


def check_config(folder: Path) -> dict[str, Any]:
    """`check_folder` for a folder that holds config.json alone."""
    path = folder / "config.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        model_type = entries["model_type"]
        is_known = model_type in CONFIG_MAPPING
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not the config of a model ({error!r})") from None
    if not is_known:
        raise CheckpointError(
            f"{path}: transformers {transformers.__version__} has no model type {model_type!r}",
            hint="a newer transformers may; moeq runs no code that ships with a checkpoint",
        )
    for part in (entries, entries.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, dict) else None
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
        if found is not None and method != QUANT_METHOD:
            raise CheckpointError(
                f"{path}: the checkpoint is already quantized ({method})",
                hint="moeq starts from the unquantized checkpoint",
            )
    try:
        AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: transformers does not take it: {reason}") from error
    return dict(entries)


def model_class(entries: dict[str, Any]) -> Any:
    """The class that the checkpoint was saved from, where transformers has it."""
    names = entries.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, str(name), None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    return found if is_model else AutoModelForCausalLM


def quantization_of(model: nn.Module) -> OnlineQuantizationConfig:
    """The config under which a model was quantized.

    Raises:
        ModelError: moeq did not quantize it.
    """
    return _quantizer_of(model).quantization_config


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    # Without any of these transformers returns a tokenizer that knows no words
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder}: no tokenizer",
            hint="copy the original model's: tokenizer.save_pretrained(folder)",
        )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}: no usable tokenizer ({type(error).__name__})",
            hint="the folder needs tokenizer.json and tokenizer_config.json",
        ) from error


def report_of(model: nn.Module) -> LoadReport:
    """The report of the load that made this model.

    Raises:
        ModelError: moeq did not quantize it while loading.
    """
    report = _quantizer_of(model).report
    assert report is not None, "kept by every load that ends well"
    return report


def _quantizer_of(model: nn.Module) -> MoeqHfQuantizer:
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, MoeqHfQuantizer):
        raise ModelError("the model was not quantized by moeq while it loaded")
    return quantizer
