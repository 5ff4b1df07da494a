"""One layer under one scheme, apart from its model: quantized from weights that are in memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeq.config import OnlineQuantizationConfig
from moeq.engines.hf_deferred import Experts
from moeq.engines.hf_stream import create_method, warn_of_empty_experts
from moeq.engines.hf_structure import Target, activation_of
from moeq.methods.base import OnlineMoEMethodBase
from moeq.methods.linear import OnlineLinearMethod
from moeq.methods.parameters import parameter
from moeq.quantize import dequantize
from moeq.span import Span


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer as a load under its scheme would have it.

    Attributes:
        method: that quantized it.
        holder: of codes and scales.
        bias: of a linear; experts hold their own.
        weight_errors: of each expert, or of the one weight: |W' - W| / |W|, Frobenius.
    """

    method: OnlineMoEMethodBase | OnlineLinearMethod
    holder: nn.Module
    bias: Tensor | None
    weight_errors: tuple[float, ...]

    def __call__(self, *args: Tensor) -> Tensor:
        """As the model's module is called."""
        if isinstance(self.method, OnlineLinearMethod):
            (x,) = args
            return self.method.apply(self.holder, x, self.bias)
        x, topk_ids, topk_weights = args
        return self.method.apply(self.holder, x, topk_ids, topk_weights)


def quantize_experts(
    config: OnlineQuantizationConfig, target: Target, experts: Experts, dtype: torch.dtype
) -> QuantizedLayer:
    """Experts under the scheme that `config` has for them.

    Args:
        config: names the scheme and its backend.
        target: the layer.
        experts: on the device where they are to run.
        dtype: of activations.

    Raises:
        MoeqError: as a load would: not finite, or no kernel here.
    """
    holder, shape = nn.Module(), target.shape
    method = create_method(config, dataclasses.replace(target, module=holder), dtype)
    assert isinstance(method, OnlineMoEMethodBase)
    method.materialize(holder, experts.w13.device)
    i, name = shape.intermediate_size, shape.name
    for expert, (w13, w2) in enumerate(zip(experts.w13, experts.w2, strict=True)):
        rows = {"up": w13[-i:], "down": w2} | ({"gate": w13[:i]} if shape.is_gated else {})
        arrivals: Any = [
            (expert, part, Span.of(weight), f"{name}, {part} of expert {expert}")
            for part, weight in rows.items()
        ]
        method.load_experts(holder, arrivals)
        if experts.b13 is not None and experts.b2 is not None:
            b13, b2 = experts.b13[expert], experts.b2[expert]
            method.load_bias(holder, expert, "up", b13[-i:], name)
            method.load_bias(holder, expert, "down", b2, name)
            if shape.is_gated:
                method.load_bias(holder, expert, "gate", b13[:i], name)
    warn_of_empty_experts(method, holder, name)
    activation, gate, after = activation_of(target.module)
    method.process_weights_after_loading(holder, activation=activation, gate=gate, after=after)
    weights, grain = method.weights(holder), method.scheme.granularity
    parts = 2 if shape.is_gated else 1
    errors = []
    for expert in range(shape.num_experts):
        acting = (
            dequantize(weights.w13[expert], weights.w13_scale[expert], grain, parts=parts),
            dequantize(weights.w2[expert], weights.w2_scale[expert], grain),
        )
        errors.append(_relative_error(acting, (experts.w13[expert], experts.w2[expert])))
    return QuantizedLayer(method, holder, None, tuple(errors))


def quantize_linear(
    config: OnlineQuantizationConfig, target: Target, linear: Any, dtype: torch.dtype
) -> QuantizedLayer:
    """A linear that is loaded, under the scheme that `config` has for it; otherwise as above."""
    holder, weight = nn.Module(), linear.weight
    method = create_method(config, dataclasses.replace(target, module=holder), dtype)
    assert isinstance(method, OnlineLinearMethod)
    method.load(holder, weight, target.shape.name, weight.device)
    method.process_weights_after_loading(holder)
    codes, scale = parameter(holder, "weight_codes"), parameter(holder, "weight_scale")
    acting = dequantize(codes, scale, method.scheme.granularity)
    error = _relative_error((acting,), (weight,))
    return QuantizedLayer(method, holder, linear.bias, (error,))


def _relative_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """0 where there is nothing to be wrong about."""
    wrong = sum(float((f - e.float()).square().sum()) for f, e in zip(found, expected, strict=True))
    whole = sum(float(e.float().square().sum()) for e in expected)
    return (wrong / whole) ** 0.5 if whole else 0.0
