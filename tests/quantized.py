"""Weights of any scheme, quantized and back by `moeq.quantize`: what layers and files must hold."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moeq import four_bits
from moeq.experts import code_columns, group_shape
from moeq.quantize import amax, dequantize, quantize, scale_from_amax
from moeq.schemes import OnlineQuantScheme


class Quantized(NamedTuple):
    """Of weights [..., N, K]; `group` where the scheme has groups."""

    codes: Tensor
    scale: Tensor
    group: Tensor | None


def quantized(
    weight: Tensor, scheme: OnlineQuantScheme, maximum: Tensor | None = None
) -> Quantized:
    """Weights [..., N, K]; `maximum`: their amax, where they share it with others."""
    grain, dtype = scheme.granularity, scheme.weight_dtype
    scale = scale_from_amax(amax(weight, grain) if maximum is None else maximum, dtype)
    grouped = group_shape(scheme, tuple(weight.shape))
    if grouped is None:
        return Quantized(quantize(weight, scale, dtype, grain), scale, None)
    *lead, k = weight.shape
    codes = torch.empty(*lead, code_columns(scheme, k), dtype=dtype)
    group = torch.empty(grouped, dtype=scheme.group_dtype)
    flat = (tensor.flatten(0, -2) for tensor in (codes, group))
    four_bits.quantize(weight.flatten(0, -2), scale.view(-1), *flat)
    return Quantized(codes, scale, group)


def acting(
    layer: nn.Module, name: str, scheme: OnlineQuantScheme, columns: int, parts: int = 1
) -> Tensor:
    """fp32 [..., N, K] of a layer's parameters called "w13_codes" and so on: name is "w13", "w2" or
    "weight", columns are K, parts the projections stacked along N."""
    return dequantize(
        layer.get_parameter(f"{name}_codes"),
        layer.get_parameter(f"{name}_scale"),
        scheme.granularity,
        parts=parts,
        group_scale=layer._parameters.get(f"{name}_group_scale"),
        columns=columns,
    )
