"""The transformers engine: a quantizer that takes over the tensors it quantizes, and nothing else.

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)

1. transformers builds the model on the meta device; `find_targets` finds experts and linears.
2. transformers hands over its table of conversions; `find_routes` learns from it which checkpoint
   tensors feed our layers, and checks that they are all there. Still nothing is allocated.
3. We put one converter in front of that table. It claims exactly those tensors; instead of merging
   a layer in bf16 it reads one expert's projection after another and quantizes each into place.
   Everything else loads as transformers loads it.
4. Afterwards our layers get their classes, their kernels are chosen, and a `LoadReport` is kept.

A checkpoint that `save_pretrained` wrote holds codes and scales under names of their own and loads
as any other, without step 2 and 3. Written against transformers 5.17 to 5.23: the hooks that
changed between those are marked.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto as hf_auto
from transformers.quantizers.base import HfQuantizer

from moeq.checkpoint.headers import TensorSpec, checkpoint_files, read_headers
from moeq.checkpoint.hub import resolve_model
from moeq.checkpoint.reader import TensorReader
from moeq.config import QUANT_METHOD, OnlineQuantizationConfig
from moeq.engines.hf_routes import Routes, find_routes, quantized_names, saved_plans
from moeq.engines.hf_structure import Target, activation_of, find_targets, is_experts
from moeq.errors import CheckpointError, ConfigError, ModelError
from moeq.methods.base import OnlineMoEMethodBase
from moeq.methods.linear import OnlineLinearMethod
from moeq.plan import LayerPlan, LoadPlan, Source
from moeq.report import LoadReport, PeakMemory, make_report
from moeq.schemes import OnlineQuantScheme

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with bytes read so far and bytes to read."""

_progress: ContextVar[Progress | None] = ContextVar("progress", default=None)
"""transformers makes the quantizer, so `load` cannot hand it anything."""


def register_with_transformers() -> None:
    """Enter our quantizer and config into transformers' tables."""
    hf_auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = MoeqHfQuantizer
    hf_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = OnlineQuantizationConfig


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
        device: "cpu", "cuda", "cuda:1", ...
        progress: called with bytes read so far and bytes to read.
        kwargs: for `from_pretrained`.

    Returns:
        A transformers model; `report_of` says how it went.

    Raises:
        MoeqError: whatever is wrong with checkpoint, configuration or machine.
    """
    folder = resolve_model(model)
    entries = check_folder(folder)
    saved = entries.get("quantization_config", {}).get("quant_method") == QUANT_METHOD
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
        raise ConfigError(f"{folder} is not quantized and no scheme is named", hint=known)
    try:
        torch.device(device)
    except RuntimeError:
        raise ConfigError(f"unknown device {device!r}", hint="cpu, cuda, cuda:1, ...") from None
    register_with_transformers()
    token = _progress.set(progress)
    try:
        return _model_class(entries).from_pretrained(
            folder, quantization_config=config, device_map=device, **kwargs
        )
    finally:
        _progress.reset(token)


def check_folder(folder: Path) -> dict[str, Any]:
    """That a folder holds a model that moeq can start from, or has saved.

    Returns:
        Its config.json.

    Raises:
        CheckpointError: files missing, config not JSON, an unknown architecture, or quantized by
            somebody else.
    """
    checkpoint_files(folder)
    path = folder / "config.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        model_type = entries["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not the config of a model ({error!r})") from None
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{path}: transformers {transformers.__version__} has no model type {model_type!r}",
            hint="a newer transformers may; moeq runs no code that ships with a checkpoint",
        )
    for part in (entries, entries.get("text_config") or {}):
        method = (part.get("quantization_config") or {}).get("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise CheckpointError(
                f"{path}: the checkpoint is already quantized ({method})",
                hint="moeq starts from the unquantized checkpoint",
            )
    return dict(entries)


def _model_class(entries: dict[str, Any]) -> Any:
    """The class that the checkpoint was saved from, where transformers has it."""
    names = entries.get("architectures") or []
    found = getattr(transformers, names[0], None) if names else None
    return AutoModelForCausalLM if found is None else found


class MoeqHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """transformers' side of moeq; one per load."""

    requires_calibration = False

    quantization_config: OnlineQuantizationConfig

    def __init__(self, quantization_config: OnlineQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report: LoadReport | None = None
        self._targets: list[Target] = []
        self._kept: dict[str, str] = {}
        self._methods: dict[str, OnlineMoEMethodBase | OnlineLinearMethod] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._routes: Routes | None = None

    # What transformers asks.

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def update_device_map(self, device_map: Any) -> Any:
        """One device. Several are for tensor and expert parallelism, not for a device map."""
        if device_map is None:
            return None
        if device_map == "auto":
            device_map = {"": "cuda:0" if torch.cuda.is_available() else "cpu"}
        if not isinstance(device_map, dict):
            device_map = {"": device_map}
        devices = {str(device) for device in device_map.values()}
        if len(devices) != 1 or "disk" in devices:
            raise ModelError(
                f"device_map spreads the model over {sorted(devices)}",
                hint='moeq loads onto one device; pass device_map="cpu" or "cuda:0"',
            )
        return device_map

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Originals of quantized layers take no memory: they never leave the meta device."""
        if self._routes is not None and param_name in self._routes.sources:
            return 0
        return param.element_size()

    # The load, in the order in which transformers calls.

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files")
        if not files or not str(files[0]).endswith(".safetensors"):
            raise CheckpointError(
                "moeq quantizes from safetensors files; this model comes from"
                f" {files[0] if files else 'a state dict'}"
            )
        self._started = time.perf_counter()
        self._memory = PeakMemory()
        self._memory.__enter__()
        self._read_bytes = 0
        self._model = model
        self._dtype = kwargs.get("dtype") or torch.get_default_dtype()
        self._device = _single_device(kwargs.get("device_map"))
        self._specs = read_headers([Path(file) for file in files])
        self._targets, self._kept = find_targets(model, self.quantization_config)
        if self.pre_quantized:
            for target in self._targets:
                self._create_weights(target)
                self._finish_structure(target)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> Any:
        # `model` is passed from 5.20 on
        if self.pre_quantized:
            plans = saved_plans(self._model, self._targets, self._specs, weight_conversions)
            self.plan = _load_plan(self._model, plans, self._specs, self._kept)
            return weight_conversions
        self._routes = find_routes(self._model, self._targets, self._specs, weight_conversions)
        for name in self._routes.merged:
            self._kept[name] = "transformers merges it from several tensors"
        if self._routes.merged:
            self.quantization_config = self.quantization_config.ignoring(self._routes.merged)
            self._targets = [t for t in self._targets if t.shape.name not in self._routes.merged]
        self.plan = _load_plan(self._model, self._routes.plans, self._specs, self._kept)
        self._by_parameter = {
            parameter: target
            for target in self._targets
            for parameter in self._routes.sources
            if parameter.rpartition(".")[0] == target.shape.name
        }
        for target in self._targets:
            self._create_weights(target)
        self._reader = TensorReader(self._advance)
        return [ClaimingConverter(self._routes.claims), *weight_conversions]

    def load_parameter(self, parameter: str) -> set[str]:
        """Read, quantize and place everything that feeds one original parameter.

        Returns:
            Names of the model's parameters that need no further loading.
        """
        assert self._routes is not None
        target = self._by_parameter[parameter]
        name, module = target.shape.name, target.module
        method = self._methods[name]
        if "DTensor" in type(module._parameters[target.up_name]).__name__:
            raise ModelError(
                f"{name} is sharded over ranks", hint="moeq's transformers engine runs one process"
            )
        with _one_thread():
            for source in self._routes.sources[parameter]:
                if isinstance(method, OnlineLinearMethod):
                    weight = self._reader.read(source.spec)
                    method.load(module, weight, source.spec.name, self._device)
                else:
                    method.materialize(module, self._device)
                    self._load_source(method, module, target, source)
        return {parameter, *(f"{name}.{ours}" for ours in quantized_names(module))}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for target in self._targets:
            if self.pre_quantized:
                self._methods[target.shape.name].mark_loaded()
            else:
                self._finish_structure(target)
            self._choose_kernel(target)
        if not self.pre_quantized:
            self._reader.close()
            # Ours must not be undone when saving: codes are saved as they are
            model._weight_conversions = [
                entry
                for entry in getattr(model, "_weight_conversions", None) or []
                if not isinstance(entry, ClaimingConverter)
            ]
        self._memory.__exit__(None, None, None)
        self._advance(self.plan.checkpoint_bytes - self._read_bytes)  # transformers' share
        self.report = make_report(
            self.plan,
            peak=self._memory.peak_bytes,
            seconds=time.perf_counter() - self._started,
            kernels=self._kernels(),
        )
        for line in self.report.lines():
            logger.info(line)
        model.config.quantization_config = self.quantization_config

    # Steps of the load.

    def _advance(self, nbytes: int) -> None:
        progress = _progress.get()
        self._read_bytes += nbytes
        if progress is not None:
            progress(self._read_bytes, self.plan.checkpoint_bytes)

    def _create_weights(self, target: Target) -> None:
        shape = target.shape
        method = self.quantization_config.get_quant_method(shape.name, shape.kind)
        assert method is not None
        self._methods[shape.name] = method
        if isinstance(method, OnlineLinearMethod):
            method.create_weights(
                target.module,
                in_features=shape.hidden_size,
                out_features=shape.intermediate_size,
                dtype=self._dtype,
            )
            method.select_backend(self._device)
            return
        method.create_weights(
            target.module,
            num_experts=shape.num_experts,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            is_gated=shape.is_gated,
            has_bias=shape.has_bias,
            dtype=self._dtype,
        )
        method.select_backend(self._device, activation_of(target.module)[0])

    def _load_source(
        self, method: OnlineMoEMethodBase, module: nn.Module, target: Target, source: Source
    ) -> None:
        stacked = range(target.shape.num_experts)
        for expert in stacked if source.expert is None else (source.expert,):
            index = expert if source.expert is None else None
            tensor = self._reader.read(source.spec, index)
            if source.transposed:
                tensor = tensor.T.contiguous()
            load = method.load_bias if source.is_bias else method.load_expert
            for part, piece in _pieces(source, tensor):
                load(module, expert, part, piece, source.spec.name)

    def _finish_structure(self, target: Target) -> None:
        """Drop the original parameters and give the module its quantized class."""
        module, method = target.module, self._methods[target.shape.name]
        names = [target.up_name]
        if target.shape.kind == "moe":
            names += ["down_proj", f"{target.up_name}_bias", "down_proj_bias"]
        for name in names:
            module._parameters.pop(name, None)
        module._moeq_method = method  # type: ignore[assignment]
        # Its weights are there: transformers must not initialize what it does not know
        module._is_hf_initialized = True  # type: ignore[assignment]
        base = QuantizedLinear if target.shape.kind == "linear" else _experts_class(type(module))
        module.__class__ = base

    def _choose_kernel(self, target: Target) -> None:
        module, method = target.module, self._methods[target.shape.name]
        if isinstance(method, OnlineLinearMethod):
            method.process_weights_after_loading(module)
            return
        activation, gate, after = activation_of(module)
        method.process_weights_after_loading(module, activation=activation, gate=gate, after=after)

    def _kernels(self) -> dict[str, str]:
        kernels: dict[str, str] = {}
        for target in self._targets:
            choice = self._methods[target.shape.name].choice
            assert choice is not None
            note = f" ({choice.note})" if choice.note else ""
            kind = f"{target.shape.kind} {target.scheme.value}"
            kernels[kind] = f"{choice.backend.name}{note}"
        return kernels


class ClaimingConverter(WeightConverter):  # type: ignore[misc]
    """An entry of transformers' table that claims the tensors we read ourselves.

    transformers asks every entry in turn where a key goes (`rename_source_key`), collects the keys
    of one parameter in a copy of the entry, and calls `convert` on it. This one knows its keys by
    name, and never touches what was collected.
    """

    __slots__ = ("claims",)

    _PATTERN = "moeq.claimed"
    _was_used: bool

    def __init__(self, claims: dict[str, str]) -> None:
        super().__init__([self._PATTERN], [self._PATTERN], [_Keep()])
        self.claims = claims

    def __deepcopy__(self, memo: dict[int, Any]) -> ClaimingConverter:
        return type(self)(self.claims)  # one copy per parameter: do not copy the table of names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        parameter = self.claims.get(source_key)
        if parameter is None:
            return source_key, None
        self._was_used = True  # type: ignore[misc]  # a slot of the base class
        return parameter, self.source_patterns[0]

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Tensor]:
        self.collected_tensors.clear()
        loading_info.missing_keys.difference_update(hf_quantizer.load_parameter(layer_name))
        return {}


class _Keep(ConversionOps):  # type: ignore[misc]
    """A converter must list an operation; ours is never run."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict


class QuantizedLinear(nn.Linear):
    """An `nn.Linear` whose weight is codes and scales."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight as it acts, dequantized: for model code that reads it instead of calling."""
        method: OnlineLinearMethod = self._moeq_method  # type: ignore[assignment]
        return method.dequantized(self)

    def forward(self, x: Tensor) -> Tensor:
        method: OnlineLinearMethod = self._moeq_method  # type: ignore[assignment]
        return method.apply(self, x)


_EXPERTS_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _experts_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a model's experts class that runs our op; keeps its gate, limits and norms."""

    def forward(
        self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        method: OnlineMoEMethodBase = self._moeq_method
        return method.apply(self, hidden_states, top_k_index, top_k_weights)

    if base not in _EXPERTS_CLASSES:
        _EXPERTS_CLASSES[base] = type(f"Quantized{base.__name__}", (base,), {"forward": forward})
    return _EXPERTS_CLASSES[base]


def quantization_of(model: nn.Module) -> OnlineQuantizationConfig:
    """The config under which a model was quantized.

    Raises:
        ModelError: moeq did not quantize it.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, MoeqHfQuantizer):
        raise ModelError("the model was not quantized by moeq while it loaded")
    return quantizer.quantization_config


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: no usable tokenizer ({type(error).__name__})",
            hint="the folder needs tokenizer.json and tokenizer_config.json",
        ) from error


def report_of(model: nn.Module) -> LoadReport:
    """The report of the load that made this model.

    Raises:
        ModelError: moeq did not quantize it while loading.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    report = quantizer.report if isinstance(quantizer, MoeqHfQuantizer) else None
    if report is None:
        raise ModelError("the model was not quantized by moeq while it loaded")
    return report


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Quantizing runs operators of some microseconds: threads of an operator wait for one another
    longer than they work, and a hundred times longer where another process has the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pieces(source: Source, tensor: Tensor) -> list[tuple[Any, Tensor]]:
    """Projections in one matrix [N, K] or bias [N]."""
    if source.part != "gate_up":
        return [(source.part, tensor)]
    if source.interleaved:
        return [("gate", tensor[0::2]), ("up", tensor[1::2])]
    gate, up = tensor.chunk(2)
    return [("gate", gate), ("up", up)]


def _load_plan(
    model: nn.Module,
    plans: tuple[LayerPlan, ...],
    specs: dict[str, TensorSpec],
    kept: dict[str, str],
) -> LoadPlan:
    quantized = sum(
        source.spec.nbytes
        for plan in plans
        if plan.shape.kind == "moe"
        for source in plan.sources
        if not source.is_bias
    )
    unquantized = sum(
        parameter.numel() * parameter.element_size()
        for name, module in model.named_modules()
        if is_experts(module) and name in kept
        for parameter in module._parameters.values()
        if parameter is not None and parameter.ndim == 3
    )
    total = sum(spec.nbytes for spec in specs.values())
    return LoadPlan(plans, total, quantized + unquantized, kept)


def _single_device(device_map: Any) -> torch.device:
    if device_map is None:
        return torch.device("cpu")
    (device,) = {str(device) for device in device_map.values()}
    return torch.device(f"cuda:{device}" if device.isdigit() else device)
