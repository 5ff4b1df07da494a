"""The quantized parameters of a layer: to make, to read, to judge."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moeq import four_bits
from moeq.errors import CheckpointError, ModelError
from moeq.experts import code_columns, group_shape, scale_shape
from moeq.kernels import cpu_int4
from moeq.methods.matrices import Storage
from moeq.quantize import LARGEST, QMAX, WEIGHT_DTYPES
from moeq.schemes import OnlineQuantScheme

_ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector of a CPU."""

_UNDECIDED = torch.int16
"""Codes while they are rearranged: no kernel takes them, should that be interrupted."""


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
        assert scheme.group_dtype is not None
        register_meta(layer, f"{name}_group_scale", groups, scheme.group_dtype)


def storage(layer: nn.Module, name: str) -> Storage:
    """Of the matrices that `register_matrices` made room for, to be written: not arranged."""
    found = _storage(layer, name)
    assert not _is_arranged(found), name
    return found


def stored(layer: nn.Module, name: str, matrix: int | None = None) -> Storage:
    """The same to be read, however codes lie; of stacked matrices one, or all. What is arranged is
    copied."""
    found = _storage(layer, name)
    is_arranged = _is_arranged(found)
    codes, scales, groups = found
    if matrix is not None:
        codes, scales = codes[matrix], scales[matrix]
        groups = None if groups is None else groups[matrix]
    if is_arranged:
        assert groups is not None
        codes, groups = cpu_int4.restore(codes.clone(), groups.clone())
    return Storage(codes, scales, groups)


def arrange(layer: nn.Module, name: str, columns: int) -> None:
    """Codes and group scales as the CPU's kernels read them fastest, in place, where they have a
    way of their own; K is `columns`. Once is enough. What was mapped from a file takes memory
    then."""
    codes, _, groups = found = _storage(layer, name)
    if groups is None or _is_arranged(found):
        return
    if cpu_int4.can_arrange(groups.dtype, codes.shape[-2], columns):
        _rearrange(layer, name, cpu_int4.arrange)


def restore(layer: nn.Module, name: str) -> None:
    """Back into the order of files, in place."""
    if _is_arranged(_storage(layer, name)):
        _rearrange(layer, name, cpu_int4.restore)


def has_arranged(layer: nn.Module) -> bool:
    """Whether codes of the layer lie in an order that is this machine's."""
    own = layer.named_parameters(recurse=False)
    return any(name.endswith("_codes") and cpu_int4.is_arranged(codes) for name, codes in own)


def _storage(layer: nn.Module, name: str) -> Storage:
    groups = layer._parameters.get(f"{name}_group_scale")
    return Storage(
        parameter(layer, f"{name}_codes").data,
        parameter(layer, f"{name}_scale").data,
        None if groups is None else groups.data,
    )


def _is_arranged(matrices: Storage) -> bool:
    if matrices.groups is not None and matrices.codes.dtype == _UNDECIDED:
        raise ModelError(
            "rearranging the codes of this layer was interrupted, and nobody knows where they lie",
            hint="load the model again",
        )
    return matrices.groups is not None and cpu_int4.is_arranged(matrices.codes)


def _rearrange(
    layer: nn.Module, name: str, how: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    codes, scale = (parameter(layer, f"{name}_{kind}") for kind in ("codes", "group_scale"))
    before = codes.data
    codes.data = before.view(_UNDECIDED)
    after, scale.data = how(before, scale.data)
    codes.data = after


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
    if not four_bits.CODES[scale.dtype].are_scales(scale):
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
