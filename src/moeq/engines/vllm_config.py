"""`OnlineQuantizationConfig` as vLLM asks it: one name a scheme, and a method for every layer."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from moeq.config import OnlineQuantizationConfig, matches
from moeq.engines.vllm import PREFIX
from moeq.engines.vllm_arrivals import watch_loader
from moeq.engines.vllm_layers import MoeqLinearMethod, MoeqMoEMethod
from moeq.errors import ConfigError, ModelError, PatternError
from moeq.methods.base import OnlineMoEMethodBase
from moeq.schemes import LayerKind, OnlineQuantScheme

_ROUTERS = ("gate", "router", "shared_expert_gate")
"""Last parts of the names of linears whose few outputs decide for a whole token."""


class MoeqConfig(QuantizationConfig):  # type: ignore[misc]
    """An `OnlineQuantizationConfig`, asked by vLLM.

    Args:
        config: what becomes of which layer; by default the scheme of the name, for all it covers.

    Raises:
        ConfigError: no scheme, neither by the name nor in a config.
    """

    name: ClassVar[str] = "moeq"
    scheme: ClassVar[OnlineQuantScheme | None] = None

    def __init__(self, config: OnlineQuantizationConfig | None = None) -> None:
        super().__init__()
        if config is None and self.scheme is None:
            raise ConfigError(
                "--quantization moeq needs a config that says which scheme",
                hint=f"--quantization {PREFIX}int8_per_channel_weight_only, or --hf-overrides"
                ' \'{"quantization_config_dict_json": "{...}"}\'',
            )
        self.config = config or OnlineQuantizationConfig(self.scheme)
        self._asked: set[str] = set()
        self._quantized: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:  # to vLLM's workers; its class has no name of its own
        return _restored, (self.name, vars(self))

    # What vLLM asks about the quantization.

    @classmethod
    def get_name(cls) -> str:
        return cls.name

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # the oracle knows, and says why

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MoeqConfig:
        raise ConfigError(
            f"the checkpoint is quantized already (quant_method {config.get('quant_method')!r}),"
            " and vLLM's plugin quantizes unquantized ones",
            hint="start from the original; of moeq's own format there is one that vLLM reads:"
            " moeq quantize --format compressed-tensors",
        )

    @classmethod
    def from_config_dict_json(cls, text: str | dict[str, Any]) -> MoeqConfig:
        """vLLM's way to pass a config: `quantization_config_dict_json` in `--hf-overrides`."""
        entries = text if isinstance(text, dict) else _json_object(text)
        if cls.scheme is not None and not {"quantization", "targets"} & set(entries):
            entries = {"quantization": cls.scheme.value, **entries}
        return cls(OnlineQuantizationConfig.from_dict(entries))

    @property
    def online_quantization_config(self) -> None:
        return None

    @online_quantization_config.setter
    def online_quantization_config(self, value: object) -> None:
        if value is not None:
            raise ConfigError(
                "--quantization-config is for vLLM's own schemes",
                hint='moeq takes --hf-overrides \'{"quantization_config_dict_json": "{...}"}\'',
            )

    # What vLLM asks about a layer.

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """vLLM's method for one of its layers; None, which is vLLM's own, where it is not ours."""
        if isinstance(layer, RoutedExperts):
            name = prefix.removesuffix(".routed_experts")
            if self._scheme_for(name, "moe") is None:
                return None
            method = self.config.get_quant_method(name, "moe")
            assert isinstance(method, OnlineMoEMethodBase)
            return MoeqMoEMethod(name, method, layer)
        if not isinstance(layer, LinearBase):
            if isinstance(layer, VocabParallelEmbedding):
                self._asked.add(prefix)  # `ignore` may name them, as in moeq's own engine
            return None
        if set(_ROUTERS) & set(prefix.rsplit(".", 2)[-2:]):
            self._asked.add(prefix)
            return UnquantizedLinearMethod()
        scheme = self._scheme_for(prefix, "linear")
        if scheme is None:
            return UnquantizedLinearMethod()
        return MoeqLinearMethod(prefix, scheme, self.config.backend)

    def _scheme_for(self, name: str, kind: LayerKind) -> OnlineQuantScheme | None:
        """By the layer's name in vLLM, or by those of the checkpoint's layers it is made of, which
        then have to agree."""
        base, _, own = name.rpartition(".")
        parts = [f"{base}.{part}" for part in self.packed_modules_mapping.get(own, ())]
        self._asked.update((name, *parts))
        if not parts or any(matches(pattern, name) for pattern in self.config.patterns):
            parts = [name]
        schemes = {part: self.config.scheme_for(part, kind) for part in parts}
        if len(set(schemes.values())) > 1:
            said = ", ".join(f"{n}: {s.value if s else 'none'}" for n, s in schemes.items())
            raise ConfigError(
                f"{name} is one layer in vLLM, and its parts differ: {said}",
                hint="let a pattern match all of them, or the layer's name in vLLM",
            )
        scheme = next(iter(schemes.values()))
        if scheme is not None:
            self._quantized.update((name, *parts))
        return scheme

    def check_patterns(self) -> None:
        """Once all layers are there.

        Raises:
            PatternError: one matches nothing, or a target nothing that can be quantized. Pipeline
                stages hold a part of the layers each, and are not asked.
            ModelError: no layer is quantized.
        """
        parallel = get_current_vllm_config().parallel_config
        if parallel.pipeline_parallel_size != 1:
            return
        self.config.check_patterns(self._asked)
        for pattern in self.config.targets:
            if not any(matches(pattern, name) for name in self._quantized):
                raise PatternError(
                    f"target {pattern!r} matches no layer that can be quantized",
                    hint="experts and linears can, routers and heads cannot",
                )
        if not self._quantized:
            raise ModelError(
                f"{self.config!r} covers no layer of the model",
                hint="int8_per_channel_weight_only is for experts alone; the other schemes quantize"
                " linears too",
            )


_CONFIGS: dict[str, type[MoeqConfig]] = {"moeq": MoeqConfig} | {
    PREFIX + scheme.value: type(
        "MoeqConfig", (MoeqConfig,), {"name": PREFIX + scheme.value, "scheme": scheme}
    )
    for scheme in OnlineQuantScheme
}


def register_configs() -> None:
    """Enter them into vLLM's table."""
    for name, config in _CONFIGS.items():
        register_quantization_config(name)(config)
    watch_loader(tuple(_CONFIGS))


def _restored(name: str, state: dict[str, Any]) -> MoeqConfig:
    config = _CONFIGS[name].__new__(_CONFIGS[name])
    config.__dict__ = state
    return config


def _json_object(text: str) -> dict[str, Any]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"quantization_config_dict_json is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise ConfigError(f"quantization_config_dict_json is not an object: {entries!r}")
    return entries
