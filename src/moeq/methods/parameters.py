"""The quantized parameters of a layer: to make, to read, to judge."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeq.errors import CheckpointError
from moeq.quantize import LARGEST, QMAX, WEIGHT_DTYPES

_ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector of a CPU."""


def parameter(layer: nn.Module, name: str) -> Tensor:
    """A layer's parameter, past the attribute machinery of modules: this runs for every token."""
    found = layer._parameters[name]
    assert found is not None, name
    return found


def finite_scales(layer: nn.Module) -> Tensor:
    """Whether a GPU met only what `check_finite` accepts in what it quantized into a layer: bool
    [], there."""
    own = dict(layer.named_parameters(recurse=False))
    scales = {name: scale for name, scale in own.items() if name.endswith("_scale")}
    highest = [  # NaN, if there is one
        scale.amax() * QMAX[own[name.replace("_scale", "_codes")].dtype]
        for name, scale in scales.items()
        if scale.numel()
    ]
    # A scale is rounded, and times qmax once more
    most = LARGEST * (1 + 2**-22)
    return (torch.stack(highest) <= most).all() if highest else torch.tensor(True)


def check_scale(scale: Tensor, name: str) -> None:
    """Scales are positive and finite; others are damage, and would be wrong numbers later."""
    if not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise CheckpointError(
            f"{name}: holds zeros, negative or non-finite numbers",
            hint="the saved checkpoint is damaged; quantize the original again",
        )


def align(codes: Tensor) -> None:
    """Move codes to where vector loads are fast: in a mapped file they can start at any byte."""
    if codes.device.type == "cpu" and codes.data_ptr() % _ALIGNMENT:
        codes.data = codes.data.clone()


def check_weight_dtype(weight: Tensor, name: str) -> None:
    if weight.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"{name}: dtype {weight.dtype}, expected bfloat16, float16 or float32",
            hint="moeq quantizes unquantized checkpoints",
        )


def register_meta(layer: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    meta = torch.empty(shape, dtype=dtype, device="meta")
    layer.register_parameter(name, nn.Parameter(meta, requires_grad=False))
