"""Matrices into their final storage: the numerics of `moeq.quantize`, wherever the storage is.

On a CUDA device the fused kernels of `moeq.kernels.triton.weights` do it, where they know the
codes: the same bytes, many matrices in a launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moeq import four_bits
from moeq.experts import scale_shape
from moeq.quantize import amax, check_finite, quantize, scale_from_amax
from moeq.schemes import Granularity
from moeq.span import Span


class Storage(NamedTuple):
    """Of the matrices of one shape that a layer has.

    Attributes:
        codes: contiguous; its dtype and device decide.
        scales: fp32, contiguous.
        groups: contiguous, where codes have four bits. A group of a matrix lies where its
            codes do, in units of groups.
    """

    codes: Tensor
    scales: Tensor
    groups: Tensor | None = None


class Place(NamedTuple):
    """A matrix and where in its storage it goes.

    Attributes:
        weight: [N, K], fp16, bf16 or fp32, on any device.
        at: element of the codes where this one's [N, K] (of four bits: [N, packed(K)]) begin; they
            are written.
        scale_at: element of the scales where its own begin, `scale_shape(granularity, [N, K])`;
            they are written. Under `Granularity.TENSOR` matrices can share one.
        name: of the tensor in the checkpoint, for messages.
        amax: fp32, as `quantize.amax` has it, where the matrix is a part of a larger one and shares
            scales with the rest.
    """

    weight: Span
    at: int
    scale_at: int
    name: str
    amax: Tensor | None = None


def part_of(
    place: Place, rows: range, columns: range, granularity: Granularity, device: torch.device
) -> Place:
    """Some rows and columns of a matrix [N, K], to be quantized as in the whole one: other ranks
    hold the rest of what shares a scale. Its amax is found by looking and not by asking, because
    who reads some columns of a file reads nearly all of it. Blocks are not divided.

    Raises:
        NonFiniteError: NaN or Inf, also in another rank's part of what shares a scale.
    """
    whole = place.weight.tensor().to(device)
    part = whole[rows.start : rows.stop, columns.start : columns.stop]
    if granularity is Granularity.BLOCK:
        return place._replace(weight=Span.of(part))
    mine = amax(whole, granularity)
    check_finite(whole, mine, place.name)
    if granularity is Granularity.CHANNEL:
        mine = mine[rows.start : rows.stop]
    return place._replace(weight=Span.of(part), amax=mine)


def quantize_matrices(storage: Storage, places: Sequence[Place], granularity: Granularity) -> None:
    """Scale and codes of every matrix, all of one shape.

    Raises:
        NonFiniteError: NaN or Inf among the values. On a GPU nothing waits for the answer: there
            they come out as scales that are not finite, which `check_finite` finds.
    """
    codes, scales, groups = storage
    if places and _has_kernel(codes):
        fused = [place for place in places if place.amax is None]
        if fused:
            _on_gpu(storage, fused, granularity)
        places = [place for place in places if place.amax is not None]
    shared: dict[int, Tensor] = {}
    for place in places if granularity is Granularity.TENSOR else ():
        weight, key = place.weight.tensor().to(codes.device), place.scale_at
        mine = place.amax
        if mine is None:
            mine = amax(weight, granularity)
            check_finite(weight, mine, place.name)
        shared[key] = torch.maximum(shared[key], mine) if key in shared else mine
    for span, at, scale_at, name, whole_amax in places:
        weight = span.tensor().to(codes.device)
        if granularity is Granularity.TENSOR:
            group_amax = shared[scale_at]
        elif whole_amax is not None:
            group_amax = whole_amax
        else:
            group_amax = amax(weight, granularity)
            check_finite(weight, group_amax, name)
        shape = scale_shape(granularity, tuple(weight.shape))
        scale = scales.view(-1)[scale_at : scale_at + math.prod(shape)].view(shape)
        scale.copy_(scale_from_amax(group_amax, codes.dtype))
        if groups is None:
            out = codes.view(-1)[at : at + weight.numel()].view(weight.shape)
            quantize(weight, scale, codes.dtype, granularity, out=out)
        else:
            n, count = len(weight), four_bits.groups(weight.shape[1])
            first = at // four_bits.GROUP_BYTES
            mine = groups.view(-1)[first : first + n * count].view(n, count)
            out = codes.view(-1)[at : at + mine.numel() * four_bits.GROUP_BYTES].view(n, -1)
            four_bits.quantize(weight, scale, out, mine)


def _on_gpu(storage: Storage, places: Sequence[Place], granularity: Granularity) -> None:
    from moeq.kernels.triton.weights import quantize_weights

    codes, scales, groups = storage
    device = codes.get_device()
    alike: dict[torch.dtype, list[Place]] = {}
    for place in places:
        base = place.weight.base
        if base.get_device() != device:
            moved = place.weight.tensor().to(codes.device, non_blocking=True)
            place = place._replace(weight=Span.of(moved))
        alike.setdefault(base.dtype, []).append(place)
    for group in alike.values():
        weights, at, scale_at, *_ = zip(*group)
        groups_at = [] if groups is None else [first // four_bits.GROUP_BYTES for first in at]
        quantize_weights(weights, codes, scales, at, scale_at, granularity, groups, groups_at)


def _has_kernel(codes: Tensor) -> bool:
    """Whether the kernels can write such codes where they are; else PyTorch's operators do it."""
    if not codes.is_cuda:
        return False
    from moeq.kernels.triton.weights import knows

    return bool(knows(codes.device, codes.dtype))
