"""The quantized parameters of a layer: to make, to read, to judge."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeq import int4
from moeq.errors import CheckpointError
from moeq.experts import code_columns, group_shape, scale_shape
from moeq.methods.matrices import Storage
from moeq.quantize import LARGEST, QMAX, WEIGHT_DTYPES
from moeq.schemes import OnlineQuantScheme

_ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector of a CPU."""


def parameter(layer: nn.Module, name: str) -> Tensor:
    """A layer's parameter, past the attribute machinery of modules: this runs for every token."""
    found = layer._parameters[name]
    assert found is not None, name
    return found


def register_matrices(
    layer: nn.Module, name: str, shape: tuple[int, ...], scheme: OnlineQuantScheme, parts: int = 1
) -> None:
    """Codes and scales of weights [..., N, K], made of `parts` projections stacked along N."""
    codes = (*shape[:-1], code_columns(scheme, shape[-1]))
    register_meta(layer, f"{name}_codes", codes, scheme.weight_dtype)
    grid = scale_shape(scheme.granularity, shape, parts)
    register_meta(layer, f"{name}_scale", grid, torch.float32)
    groups = group_shape(scheme, shape)
    if groups is not None:
        register_meta(layer, f"{name}_group_scale", groups, torch.float8_e4m3fn)


def storage(layer: nn.Module, name: str) -> Storage:
    """Of the matrices that `register_matrices` made room for."""
    groups = layer._parameters.get(f"{name}_group_scale")
    return Storage(
        parameter(layer, f"{name}_codes").data,
        parameter(layer, f"{name}_scale").data,
        None if groups is None else groups.data,
    )


def finite_scales(layer: nn.Module) -> Tensor:
    """Whether a GPU met only what `check_finite` accepts in what it quantized into a layer: bool
    [], there."""
    own = dict(layer.named_parameters(recurse=False))
    codes = [name for name in own if name.endswith("_codes")]
    highest = [  # NaN, if there is one
        scale.amax() * QMAX[own[name].dtype]
        for name in codes
        if (scale := own[name.replace("_codes", "_scale")]).numel()
    ]
    # A scale is rounded, and times qmax once more
    most = LARGEST * (1 + 2**-22)
    return (torch.stack(highest) <= most).all() if highest else torch.tensor(True)


def check_scales(layer: nn.Module, matrices: str, name: str) -> None:
    """The scales of the matrices called so, in the layer called `name`, are what a quantizer makes;
    others are damage, and would be wrong numbers later.

    Raises:
        CheckpointError: they are not positive and finite.
    """
    _check_scale(parameter(layer, f"{matrices}_scale"), f"{name}.{matrices}_scale")
    groups = layer._parameters.get(f"{matrices}_group_scale")
    if groups is not None:
        _check_group_scale(groups, f"{name}.{matrices}_group_scale")


def _check_scale(scale: Tensor, name: str) -> None:
    if not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise CheckpointError(
            f"{name}: holds zeros, negative or non-finite numbers",
            hint="the saved checkpoint is damaged; quantize the original again",
        )


def _check_group_scale(scale: Tensor, name: str) -> None:
    """Of either sign, but normal numbers."""
    magnitude = scale.view(torch.uint8) & 0x7F
    if not bool(((magnitude >= int4.E4M3_LEAST) & (magnitude < 0x7F)).all()):
        raise CheckpointError(
            f"{name}: holds zeros, subnormal or non-finite numbers",
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
