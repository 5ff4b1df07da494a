"""What a load would take, from config.json and headers alone.

The model is built on the meta device and goes through the same decisions as a load, which stops
before the first byte; so what is printed here is what a load holds itself to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from moeq.checkpoint.headers import TensorSpec
from moeq.config import OnlineQuantizationConfig
from moeq.engines.hf_plans import load_plan
from moeq.engines.hf_routes import Decision, decide
from moeq.engines.hf_stream import LayerStream
from moeq.engines.hf_structure import find_targets
from moeq.plan import LoadPlan

logger = logging.getLogger(__name__)


def decision_for(
    model: Any, specs: Mapping[str, TensorSpec], config: OnlineQuantizationConfig
) -> Decision:
    """What loading `model` under `config` would decide; arguments and errors as of `plan_load`."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions = get_model_conversion_mapping(model)
    return decide(model, config, find_targets(model, config), specs, conversions)


def plan_load(
    model: Any,
    specs: Mapping[str, TensorSpec],
    config: OnlineQuantizationConfig,
    devices: Iterable[torch.device],
) -> list[LoadPlan]:
    """The plans that loading `model` under `config` would follow, by device.

    Args:
        model: see `moeq.engines.load.empty_model`.
        specs: of its checkpoint.
        config: which scheme for which layer.
        devices: where it would run; they need not be there.

    Raises:
        MoeqError: as a load would, before it reads.
    """
    decision = decision_for(model, specs, config)
    streams = (LayerStream(model, decision, {}, device) for device in devices)
    return [load_plan(model, decision, specs, stream) for stream in streams]


def cache_bytes(model: nn.Module, context: int) -> int | None:
    """Bytes of a KV cache of `context` tokens: those that a static cache takes after a pass of one
    token on the meta device, so sliding windows and compressed layers count as they are."""
    from transformers import StaticCache

    twin: Any = model
    try:
        cache = StaticCache(config=twin.config.get_text_config(), max_cache_len=context)
        twin.set_experts_implementation("batched_mm")  # the one that needs no data
        with torch.device("meta"), torch.no_grad():
            twin(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    except Exception as error:  # noqa: BLE001  # whatever a model's code does without data
        logger.info("no size of the KV cache: %s", error)
        return None
    found = [v for layer in cache.layers for v in vars(layer).values()]
    tensors = [v for v in found if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return sum(t.numel() * t.element_size() for t in tensors)
