"""`moeq.load`: what can be known of a folder before transformers opens it is checked first."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from moeq.checkpoint.cache import cache_folder, entry_name, intact, making
from moeq.checkpoint.folder import VARIANT, checkpoint_files
from moeq.checkpoint.hub import resolve_model
from moeq.checkpoint.published import KNOWN, is_encoded
from moeq.checkpoint.writer import check_manifest
from moeq.config import QUANT_METHOD, OnlineQuantizationConfig
from moeq.engines.save import save
from moeq.engines.transformers import (
    MoeqHfQuantizer,
    Progress,
    register_with_transformers,
    reporting_to,
)
from moeq.errors import CheckpointError, ConfigError, ModelError, MoeqError
from moeq.memory import without_collections
from moeq.report import LoadReport
from moeq.schemes import OnlineQuantScheme

_LOCK = threading.Lock()

_DOWNLOAD = "get the model's own file; download it again"

_MOST_LAYERS = 10_000
"""transformers makes an object of every layer, and more would take memory for nothing."""

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
    cache: bool = False,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Any:
    """Load a model quantized: `from_pretrained` behind checks that come before it.

    Args:
        model: a folder, or an id on the Hugging Face hub.
        quantization: a scheme's name or a config; None for a checkpoint that moeq saved.
        device: "cpu", "cuda", "cuda:1", ...; with a `distributed_config` every rank has the one
            that transformers binds it to.
        cache: keep the quantized model in `moeq.checkpoint.cache`, and take it from there next
            time. A cache that cannot be written is a warning.
        progress: called with bytes read so far and bytes to read.
        kwargs: for `from_pretrained`.

    Returns:
        A transformers model; `report_of` says how it went.

    Raises:
        MoeqError: whatever is wrong with checkpoint, configuration or machine.
    """
    folder = resolve_model(model)
    entries = check_folder(folder)
    saved = is_saved(entries)
    config: OnlineQuantizationConfig | None = None
    if quantization is not None:
        if saved:
            raise ConfigError(
                f"{folder} is already quantized by moeq",
                hint="load it without a scheme, or start from the unquantized checkpoint",
            )
        if isinstance(quantization, str):
            config = OnlineQuantizationConfig.from_json(quantization)
        else:
            config = quantization
    elif not saved:
        known = ", ".join(scheme.value for scheme in OnlineQuantScheme)
        raise ConfigError(
            f"{folder} is not quantized by moeq and no scheme is named",
            hint=f"name one of: {known}",
        )
    if "device_map" in kwargs:
        raise ConfigError("device_map is for from_pretrained", hint="pass device=")
    checked_device(device)
    if cache and config is not None:
        if config.backend is not None:
            raise ConfigError("a cached model chooses its kernels itself: no backend with a cache")
        if _is_distributed(kwargs):
            raise ConfigError(
                "ranks have a part of a model each, and a cache has whole ones",
                hint="`moeq quantize` writes a folder that loads on ranks",
            )
        recipe = {
            "quantization": config.to_dict(),
            "strict": config.strict,  # an entry with tensors dropped is for who allowed that
            "kwargs": {k: str(kwargs[k]) for k in kwargs},
        }
        entry = cache_folder() / entry_name(folder, recipe)
        return _cached(entry, folder, config, device, progress, kwargs)
    return _load(folder, config, device, progress, kwargs)


def checked_device(device: str) -> torch.device:
    """The device of this name.

    Raises:
        ConfigError: there is none.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"unknown device {device!r}", hint="cpu, cuda, cuda:1, ...") from None
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r}: moeq runs on CPUs and CUDA devices")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{device} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices",
            hint="a build of PyTorch for CUDA, and a driver; or --device cpu",
        )
    return found


def _cached(
    entry: Path,
    folder: Path,
    config: OnlineQuantizationConfig,
    device: str,
    progress: Progress | None,
    kwargs: dict[str, Any],
) -> Any:
    """From the cache; or from the source, and into the cache."""
    started = time.perf_counter()
    with contextlib.ExitStack() as alone:
        try:
            alone.enter_context(making(entry))
            is_made = intact(entry)
        except CheckpointError as error:
            warnings.warn(f"not cached: {error.message}", stacklevel=3)
            return _load(folder, config, device, progress, kwargs)
        if not is_made:
            loaded = _load(folder, config, device, progress, kwargs)
            try:
                save(loaded, entry, max_shard_size="1GB")  # files are checked side by side
            except (MoeqError, OSError) as error:
                warnings.warn(f"not cached: {error}", stacklevel=3)
            else:
                _note(loaded, f"kept in the cache, {entry}", started)
            return loaded
        loaded = _load(entry, None, device, progress, kwargs)  # while nobody can clear it
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config.name_or_path = str(folder)  # where its tokenizer is
    _note(model, f"from the cache, {entry}", started)
    return loaded


def _note(model: nn.Module, note: str, started: float) -> None:
    """Into a load's report, with the time since it began."""
    quantizer = _quantizer_of(model)
    report = report_of(model)
    seconds = time.perf_counter() - started
    notes = (*report.notes, note)
    quantizer.report = dataclasses.replace(report, notes=notes, seconds=seconds)


def _load(
    folder: Path,
    config: OnlineQuantizationConfig | None,
    device: str,
    progress: Progress | None,
    kwargs: dict[str, Any],
) -> Any:
    """`config` is None for what moeq saved."""
    entries = check_folder(folder)
    register_with_transformers()
    # Two loads at once give wrong models: transformers changes global state while it builds one
    with _LOCK, reporting_to(progress), without_collections():
        if config is None:
            kwargs = kwargs | {"variant": VARIANT}
            if kwargs.get("config") is not None:  # of the unquantized model, it would hide this
                kwargs["config"] = copy.deepcopy(kwargs["config"])
                kwargs["config"].quantization_config = entries["quantization_config"]
        else:
            kwargs = for_source(folder, entries, kwargs)
        if not _is_distributed(kwargs):
            kwargs = kwargs | {"device_map": device}
        try:
            return model_class(entries).from_pretrained(
                folder, quantization_config=config, **kwargs
            )
        except MoeqError:
            raise
        except Exception:
            empty_model(folder)  # if that fails too it says which config is to blame
            raise


def is_saved(entries: Mapping[str, Any]) -> bool:
    """Whether moeq wrote the checkpoint of this config.json, which `check_config` has seen."""
    found = entries.get("quantization_config")
    return found is not None and not is_encoded(found)


def for_source(
    folder: Path, entries: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `from_pretrained` under which transformers does not decode a checkpoint that is
    published quantized, because we do."""
    if not is_encoded(entries.get("quantization_config")):
        return dict(kwargs)
    if kwargs.get("config") is None:
        config, unused = AutoConfig.from_pretrained(folder, **kwargs, return_unused_kwargs=True)
        rest: dict[str, Any] = unused
    else:
        config, rest = copy.deepcopy(kwargs["config"]), dict(kwargs)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if config.dtype is None:  # transformers would take the first floating dtype that it finds
        rest.setdefault("dtype", torch.bfloat16)
    return rest | {"config": config}


def _is_distributed(kwargs: dict[str, Any]) -> bool:
    """Whether transformers is to put the model on several ranks, and chooses devices itself."""
    return any(kwargs.get(name) for name in ("distributed_config", "tp_plan", "tp_size"))


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
    generation = folder / "generation_config.json"
    if generation.is_file():  # transformers does without one that it cannot read
        _read_json(generation)
    return check_config(folder)


def check_config(folder: Path) -> dict[str, Any]:
    """`check_folder` for a folder that holds config.json alone."""
    path = folder / "config.json"
    entries = _read_json(path)
    model_type = entries.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"{path}: not the config of a model (its model_type is {model_type!r})", hint=_DOWNLOAD
        )
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{path}: transformers {transformers.__version__} has no model type {model_type!r}",
            hint="a newer transformers may; moeq runs no code that ships with a checkpoint",
        )
    for part in (entries, *entries.values()):
        layers = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if isinstance(layers, int) and layers > _MOST_LAYERS:
            raise CheckpointError(
                f"{path}: num_hidden_layers is {layers}, expected at most {_MOST_LAYERS}",
                hint=_DOWNLOAD,
            )
    for part in (entries, entries.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, dict) else None
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
        is_known = method == QUANT_METHOD or (part is entries and is_encoded(found))
        if found is not None and not is_known:
            raise CheckpointError(
                f"{path}: the checkpoint is already quantized ({method})",
                hint=f"moeq starts from the unquantized checkpoint, or from {KNOWN}"
                + ("; this format is for vLLM" if method == "compressed-tensors" else ""),
            )
    try:
        dtype = AutoConfig.from_pretrained(folder).dtype
        if not isinstance(dtype, torch.dtype | None):
            raise TypeError(f"dtype is {dtype!r}")
    except Exception as error:  # whatever a config's code does with values it does not know
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: transformers does not take it: {reason}", hint=_DOWNLOAD
        ) from error
    return entries


def _read_json(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not the config of a model ({error!r})", hint=_DOWNLOAD
        ) from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: not the config of a model (no JSON object)", hint=_DOWNLOAD)
    return entries


def empty_model(folder: Path) -> Any:
    """The model of a folder on the meta device, in the dtype of its config.

    Raises:
        CheckpointError: its config describes none that can be made.
    """
    entries = check_config(folder)
    config = AutoConfig.from_pretrained(folder)
    kind = model_class(entries)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    make = kind.from_config if kind is AutoModelForCausalLM else kind._from_config
    try:
        with torch.device("meta"):
            return make(config, dtype=dtype)
    except Exception as error:  # whatever a model's code does with values it does not know
        raise CheckpointError(
            f"{folder / 'config.json'}: no {kind.__name__} can be made of it: {error!r}",
            hint=_DOWNLOAD,
        ) from error


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
