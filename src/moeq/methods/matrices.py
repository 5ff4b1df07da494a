"""Matrices into their final storage: the numerics of `moeq.quantize`, wherever the storage is.

On a CUDA device the fused kernels of `moeq.kernels.triton.weights` do it, where they know the
codes: the same bytes, many matrices in a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moeq.quantize import amax, check_finite, quantize, scale_from_amax
from moeq.schemes import Granularity


class Place(NamedTuple):
    """A matrix and where it goes.

    Attributes:
        weight: [N, K], fp16, bf16 or fp32, on any device.
        codes: [N, K], written; its dtype and device decide.
        scale: fp32, `scale_shape(granularity, weight.shape)`, written. Under `Granularity.TENSOR`
            matrices whose `scale` is the same memory share one.
        name: of the tensor in the checkpoint, for messages.
    """

    weight: Tensor
    codes: Tensor
    scale: Tensor
    name: str


def quantize_matrices(places: Sequence[Place], granularity: Granularity) -> None:
    """Scale and codes of every matrix.

    Raises:
        NonFiniteError: NaN or Inf among the values. On a GPU nothing waits for the answer: there
            they come out as scales that are not finite, which `check_finite` finds.
    """
    places = [place._replace(weight=place.weight.to(place.codes.device)) for place in places]
    if places and _has_kernel(places[0].codes):
        _on_gpu(places, granularity)
        return
    shared: dict[int, Tensor] = {}
    for place in places if granularity is Granularity.TENSOR else ():
        mine = amax(place.weight, granularity)
        check_finite(place.weight, mine, place.name)
        key = place.scale.data_ptr()
        shared[key] = torch.maximum(shared[key], mine) if key in shared else mine
    for weight, codes, scale, name in places:
        if granularity is Granularity.TENSOR:
            group_amax = shared[scale.data_ptr()]
        else:
            group_amax = amax(weight, granularity)
            check_finite(weight, group_amax, name)
        scale.copy_(scale_from_amax(group_amax, codes.dtype))
        quantize(weight, scale, codes.dtype, granularity, out=codes)


def _on_gpu(places: Sequence[Place], granularity: Granularity) -> None:
    from moeq.kernels.triton.weights import Matrix, quantize_weights

    alike: dict[tuple[torch.Size, torch.dtype], list[Matrix]] = {}
    for weight, codes, scale, _ in places:
        matrix = Matrix(weight.contiguous(), codes, scale)
        alike.setdefault((weight.shape, weight.dtype), []).append(matrix)
    for matrices in alike.values():
        quantize_weights(matrices, granularity)


def _has_kernel(codes: Tensor) -> bool:
    """Whether the kernels can write such codes where they are; else PyTorch's operators do it."""
    if not codes.is_cuda:
        return False
    from moeq.kernels.triton.weights import knows

    return bool(knows(codes.device, codes.dtype))
