"""The transformers engine: a quantizer that takes over the tensors it quantizes, and nothing else.

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)

1. transformers builds the model on the meta device; `find_targets` finds experts and linears.
2. transformers hands over its table of conversions; `find_routes` learns from it which checkpoint
   tensors feed our layers, and checks that they are all there. Still nothing is allocated.
3. We put one converter in front of that table. It claims exactly those tensors; instead of merging
   a layer in bf16, all of them are streamed in file order, each expert's projection quantized into
   place as it arrives (`hf_stream`). Everything else loads as transformers loads it.
4. Afterwards the original parameters go, kernels are chosen, and a `LoadReport` is kept.

A checkpoint that `moeq.save` wrote holds codes and scales under names of their own and loads
as any other, without step 2 and 3. Under torchrun each rank does all this with its share of the
experts (`hf_ranks`). Written against transformers 5.17 to 5.23: the hooks that changed between
those are marked.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers import auto as hf_auto
from transformers.quantizers.base import HfQuantizer

from moeq.checkpoint.headers import TensorSpec
from moeq.checkpoint.published import read_specs
from moeq.config import QUANT_METHOD, OnlineQuantizationConfig
from moeq.engines.hf_claim import ClaimingConverter
from moeq.engines.hf_modules import QuantizedLinear, experts_class
from moeq.engines.hf_plans import load_plan, saved_plan
from moeq.engines.hf_ranks import Ranks, local_bytes, ranks_of
from moeq.engines.hf_routes import Routes, decide, quantized_names, saved_plans
from moeq.engines.hf_stream import LayerStream, create_method
from moeq.engines.hf_structure import Target, activation_of, find_targets
from moeq.errors import CheckpointError, ModelError
from moeq.memory import PeakMemory, without_collections
from moeq.methods.base import OnlineMoEMethodBase
from moeq.methods.linear import OnlineLinearMethod
from moeq.report import LoadReport, make_report

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with bytes read so far and bytes to read."""

_progress: ContextVar[Progress | None] = ContextVar("progress", default=None)
"""transformers makes the quantizer, so `load` cannot hand it anything."""


_saving: ContextVar[bool] = ContextVar("saving", default=False)


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Inside it a model may be written: by `moeq.save`, which names the files."""
    token = _saving.set(True)
    try:
        yield
    finally:
        _saving.reset(token)


@contextlib.contextmanager
def reporting_to(progress: Progress | None) -> Iterator[None]:
    """Loads inside it call `progress`."""
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


def register_with_transformers() -> None:
    """Enter our quantizer and config into transformers' tables."""
    hf_auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = MoeqHfQuantizer
    hf_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = OnlineQuantizationConfig


class MoeqHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """transformers' side of moeq; one per load."""

    requires_calibration = False

    quantization_config: OnlineQuantizationConfig

    def __init__(self, quantization_config: OnlineQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report: LoadReport | None = None
        self.ranks: Ranks | None = None
        self._targets: list[Target] = []
        self._kept: dict[str, str] = {}
        self._methods: dict[str, OnlineMoEMethodBase | OnlineLinearMethod] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._routes: Routes | None = None

    # What transformers asks.

    def is_serializable(self) -> bool:
        if not _saving.get():
            raise ModelError(
                "save_pretrained writes files that other programs take for unquantized weights",
                hint="use moeq.save(model, folder)",
            )
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def update_device_map(self, device_map: Any) -> Any:
        """One device. Several are for ranks, with one each."""
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
        self._read_bytes = 0
        self._streamed = False
        self._model = model
        self._dtype = kwargs.get("dtype") or torch.get_default_dtype()
        self._device = _single_device(kwargs.get("device_map"))
        self._progress = _progress.get()  # threads do not see it
        self._memory = PeakMemory(self._device)
        self._memory.__enter__()
        with without_collections():
            self._specs = read_specs([Path(file) for file in files])
        self._targets, self._kept = find_targets(model, self.quantization_config)
        self.ranks = ranks_of(model)
        if self.ranks is not None:
            self._targets = [self.ranks.split(target) for target in self._targets]
        if self.pre_quantized:
            for target in self._targets:
                self._create_weights(target)
                self._finish_structure(target)
            if self.ranks is not None:
                self.ranks.distribute(self._targets, self._device)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> Any:
        # `model` is passed from 5.20 on
        if self.pre_quantized:
            plans = saved_plans(self._model, self._targets, self._specs, weight_conversions)
            self.plan = saved_plan(self._model, plans, self._specs, self._kept)
            return weight_conversions
        with without_collections():
            decision = decide(
                self._model,
                self.quantization_config,
                (self._targets, self._kept),
                self._specs,
                weight_conversions,
            )
            self.quantization_config = decision.config
            self._targets, self._kept = decision.targets, decision.kept
            self._routes = decision.routes
            for target in self._targets:
                self._create_weights(target)
            # Only transformers knows how it splits what is not quantized
            kept: dict[str, TensorSpec] | None = None if self.ranks is None else {}
            if self.ranks is not None and self._routes.decoded:
                raise ModelError(
                    f"{self._routes.decoded[0].name!r} is stored as codes and not quantized, which"
                    " ranks cannot share",
                    hint="quantize it too, or write a folder with `moeq quantize`, which loads on"
                    " ranks",
                )
            self._stream = LayerStream(self._model, decision, self._methods, self._device, kept)
            self.plan = load_plan(self._model, decision, self._specs, self._stream)
        self._stream.prepare()
        claims = dict(self._routes.claims)
        claims.update(
            {key: p for key, p in self._routes.plain_claims.items() if p in self._stream.kept}
        )
        return [ClaimingConverter(claims), *weight_conversions]

    def load_parameter(self, parameter: str) -> tuple[dict[str, Tensor], set[str]]:
        """Hand over what feeds one parameter that we claimed; the first call reads everything.

        Returns:
            Tensors that transformers is to set, and names of the model's parameters that need no
            further loading.
        """
        if self._stream is not None and not self._streamed:
            self._streamed = True
            for target in self._targets:
                if self.ranks is not None:
                    self.ranks.check(target)
            with without_collections():
                self._stream.run(self._advance)
        if parameter in self._stream.tensors:
            return {parameter: self._stream.tensors.pop(parameter)}, set()
        name = parameter.rpartition(".")[0]
        module = self._model.get_submodule(name)
        return {}, {parameter, *(f"{name}.{ours}" for ours in quantized_names(module))}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for target in self._targets:
            if self.pre_quantized:
                if self.ranks is not None:
                    self.ranks.check(target)
                    self.ranks.keep_local(target)
                self._methods[target.shape.name].mark_loaded(target.module, target.shape.name)
            else:
                self._finish_structure(target)
            self._choose_kernel(target)
        if not self.pre_quantized:
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
            model_bytes=local_bytes(model),
            peak=self._memory.peak_bytes,
            timeline=tuple(self._memory.samples),
            seconds=time.perf_counter() - self._started,
            kernels=self._kernels(),
            notes=self._notes(),
        )
        for line in self.report.lines():
            logger.info(line)
        model.config.quantization_config = self.quantization_config
        # The model keeps its quantizer, which must not keep the model, nor what cannot be copied
        self._targets, self._methods, self._specs, self._routes = [], {}, {}, None
        for name in ("_model", "_memory", "_stream", "_progress"):
            self.__dict__.pop(name, None)

    # Steps of the load.

    def _advance(self, nbytes: int) -> None:
        self._read_bytes += nbytes
        if self._progress is not None:
            self._progress(self._read_bytes, self.plan.checkpoint_bytes)

    def _create_weights(self, target: Target) -> None:
        method = create_method(self.quantization_config, target, self._dtype)
        self._methods[target.shape.name] = method
        if isinstance(method, OnlineLinearMethod):
            method.select_backend(self._device)
            return
        module = target.module
        method.select_backend(self._device, activation_of(module)[0])
        # At once: for ranks, transformers wraps the forward that it finds before it loads
        module._moeq_method = method  # type: ignore[assignment]
        module.__class__ = experts_class(type(module))

    def _finish_structure(self, target: Target) -> None:
        """Drop the original parameters; a linear gets its quantized class."""
        module, method = target.module, self._methods[target.shape.name]
        names = [target.up_name]
        if target.shape.kind == "moe":
            names += ["down_proj", f"{target.up_name}_bias", "down_proj_bias"]
        for name in names:
            module._parameters.pop(name, None)
        module._moeq_method = method  # type: ignore[assignment]
        # Its weights are there: transformers must not initialize what it does not know
        module._is_hf_initialized = True  # type: ignore[assignment]
        if target.shape.kind == "linear":
            module.__class__ = QuantizedLinear

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
            kernels[f"{target.shape.kind} {target.scheme.value}"] = choice.backend.name
        return kernels

    def _notes(self) -> tuple[str, ...]:
        choices = [method.choice for method in self._methods.values()]
        notes = dict.fromkeys(choice.note for choice in choices if choice and choice.note)
        if self.plan.dropped:
            notes[f"dropped, the model has no place for them: {', '.join(self.plan.dropped)}"] = (
                None
            )
        return tuple(notes)


def _single_device(device_map: Any) -> torch.device:
    if device_map is None:
        return torch.device("cpu")
    (device,) = {str(device) for device in device_map.values()}
    return torch.device(f"cuda:{device}" if device.isdigit() else device)
