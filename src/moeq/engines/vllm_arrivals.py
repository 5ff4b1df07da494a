"""What never arrives from a checkpoint, found in vLLM.

vLLM looks for it in unquantized models alone, and there not among linears. With a quantization a
router, a norm or an output layer that the checkpoint lacks would be whatever memory held.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from moeq.engines.vllm_layers import MoeqLinearMethod
from moeq.errors import CheckpointError

_FILLED = "_moeq_looks_for_what_is_missing"


def watch_loader(names: tuple[str, ...]) -> None:
    """Have vLLM's loader look, in models of these quantizations. Safe to call again."""
    original = DefaultModelLoader.load_weights
    if hasattr(original, _FILLED):
        return

    @functools.wraps(original)
    def load_weights(self: Any, model: nn.Module, model_config: Any) -> None:
        if model_config.quantization not in names:
            original(self, model, model_config)
            return
        get_current_vllm_config().quant_config.check_patterns()
        unquantized = _fill_unquantized(model)
        arrived: list[set[str] | None] = []
        load: Any = model.load_weights

        def remembering(weights: Any) -> set[str] | None:
            found: set[str] | None = load(weights)
            arrived.append(found)
            return found

        model.__dict__["load_weights"] = remembering
        try:
            original(self, model, model_config)
        finally:
            del model.__dict__["load_weights"]
        for name, tensor in unquantized.items():
            if tensor.numel() and bool(tensor.amax().isnan()):
                raise CheckpointError(
                    f"{name}: NaN, or some of it never arrived",
                    hint="the checkpoint is damaged or incomplete",
                )
        for found in arrived:
            # What vLLM asks of unquantized models; others' methods check their own
            if found is not None and getattr(self, "enable_weights_track", None) is None:
                self.track_weights_loading(model, set(found))

    setattr(load_weights, _FILLED, True)
    DefaultModelLoader.load_weights = load_weights


def _fill_unquantized(model: nn.Module) -> dict[str, Tensor]:
    """NaN into what is neither loaded yet nor looked at by a method: linears and embeddings that
    stay as they are, and the biases of all linears."""
    plain = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if not isinstance(method, (*plain, MoeqLinearMethod)):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            is_ours = own == "weight" and not isinstance(method, plain)
            if is_ours or parameter.is_meta or not parameter.is_floating_point():
                continue
            parameter.data.fill_(torch.nan)
            found[f"{name}.{own}"] = parameter.data
    return found
