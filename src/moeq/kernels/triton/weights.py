"""Weights to codes on the GPU: `moeq.quantize`, bit for bit; many matrices in a launch.

    block     a program reads 128 x 128 weights, keeps them in registers, writes scale and codes
    channel   a program goes twice over some rows; the second time they come from L1
    tensor    amax first (a maximum needs no order, so programs may meet in one word), then codes,
              from the end: what was read last is still in L2. A matrix that does not fit there
              is read twice

A table says where the matrices are, so that the experts of a layer, or what a chunk of
a checkpoint brings, cost one launch and not hundreds.

Scales of groups with NaN or Inf come out as NaN or Inf: `moeq.quantize.check_finite` finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeq.experts import scale_shape
from moeq.kernels.triton.plans import FP8_CAPABILITY, gpu
from moeq.kernels.triton.rows import BLOCK, encode, magnitude, scale_of
from moeq.schemes import Granularity

_TILE = 1 << 14
"""Elements of a program where any number will do."""

_HEIGHT, _STEP = 4, 512
"""Rows of a program, and columns that it takes at a time: a power of two wastes lanes on rows of
768 or 14336."""


def knows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU has the type of the codes: before compute capability 8.9 there is no e4m3."""
    return dtype == torch.int8 or gpu(device).capability >= FP8_CAPABILITY


class Matrix(NamedTuple):
    """One matrix and its place.

    Attributes:
        weight: [N, K], fp16, bf16 or fp32, contiguous, on the GPU.
        codes: [N, K], written, int8 or fp8; contiguous.
        scale: fp32, `scale_shape(granularity, weight.shape)`, written; contiguous.
    """

    weight: Tensor
    codes: Tensor
    scale: Tensor


def quantize_weights(matrices: Sequence[Matrix], granularity: Granularity) -> None:
    """Quantize matrices into final storage.

    Args:
        matrices: of one shape and one dtype each for weights and codes, on one GPU. Under
            `Granularity.TENSOR` those whose `scale` is the same memory share its amax.
        granularity: what shares a scale.
    """
    weight, codes, scale = matrices[0]
    n, k = weight.shape
    for matrix in matrices:
        assert all(tensor.is_contiguous() for tensor in matrix)
        assert matrix.weight.shape == matrix.codes.shape == weight.shape, matrix.codes.shape
        assert (matrix.weight.dtype, matrix.codes.dtype) == (weight.dtype, codes.dtype)
        assert tuple(matrix.scale.shape) == scale_shape(granularity, (n, k)), matrix.scale.shape
    if weight.numel() == 0:
        for matrix in matrices:
            matrix.scale.fill_(1.0)
        return
    slots = {place: slot for slot, place in enumerate({m.scale.data_ptr() for m in matrices})}
    entries = [
        [
            *((t.data_ptr() - first.data_ptr()) // t.itemsize for t, first in zip(m, matrices[0])),
            slots[m.scale.data_ptr()],
        ]
        for m in matrices
    ]
    # What lets the compiler move 16 bytes at a time
    aligned = k % 16 == 0 and not any(d % 16 for entry in entries for d in entry[:2])
    table = torch.tensor(entries, pin_memory=codes.is_cuda).to(codes.device, non_blocking=True)
    many = len(matrices)
    with torch.cuda.device_of(codes):  # Triton launches on the current device
        match granularity:
            case Granularity.CHANNEL:
                step = min(_STEP, triton.next_power_of_2(k))
                _rows[(triton.cdiv(n, _HEIGHT), many)](
                    table, weight, codes, scale, n, k,
                    HEIGHT=_HEIGHT, STEP=step, ALIGNED=aligned, num_warps=4,
                )  # fmt: skip
            case Granularity.BLOCK:
                grid = (triton.cdiv(k, 128), triton.cdiv(n, 128), many)
                _blocks[grid](table, weight, codes, scale, n, k, ALIGNED=aligned, num_warps=8)
            case Granularity.TENSOR:
                bits = torch.zeros(len(slots), dtype=torch.int32, device=codes.device)
                size = weight.numel()
                tiles = (triton.cdiv(size, _TILE), many)
                _amax[tiles](table, weight, bits, size, TILE=_TILE, ALIGNED=aligned, num_warps=8)
                _encode[tiles](
                    table, weight, codes, scale, bits, size,
                    TILE=_TILE, ALIGNED=aligned, num_warps=8,
                )  # fmt: skip


@triton.jit
def _place(base, table, at, COLUMN: tl.constexpr, ALIGNED: tl.constexpr):
    """Where matrix `at` is, by its distance from the first: the table holds distances and not
    addresses, because the compiler knows how `base` is aligned."""
    distance = tl.load(table + at * 4 + COLUMN)
    if ALIGNED:
        distance = tl.multiple_of(distance, 16)
    return base + distance


@triton.jit
def _rows(
    table, w, codes, scale, N, K,
    HEIGHT: tl.constexpr, STEP: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    w = _place(w, table, tl.program_id(1), 0, ALIGNED)
    codes = _place(codes, table, tl.program_id(1), 1, ALIGNED)
    scale = _place(scale, table, tl.program_id(1), 2, False)
    n = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    k = tl.arange(0, STEP)
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    highest = tl.zeros((HEIGHT, STEP), tl.int32)
    for k0 in range(0, K, STEP):
        mask = (n < N)[:, None] & (k < K - k0)[None, :]
        value = tl.load(w + at + k0, mask=mask, other=0.0).to(tl.float32)
        highest = tl.maximum(highest, magnitude(value))
    amax = tl.max(highest, 1).to(tl.float32, bitcast=True)
    by_row = scale_of(amax, codes.dtype.element_ty)
    tl.store(scale + n, by_row, mask=n < N)
    for k0 in range(0, K, STEP):
        mask = (n < N)[:, None] & (k < K - k0)[None, :]
        value = tl.load(w + at + k0, mask=mask, other=0.0).to(tl.float32)
        code = encode(value, by_row[:, None], codes.dtype.element_ty)
        tl.store(codes + at + k0, code, mask=mask)


@triton.jit
def _blocks(table, w, codes, scale, N, K, ALIGNED: tl.constexpr):
    w = _place(w, table, tl.program_id(2), 0, ALIGNED)
    codes = _place(codes, table, tl.program_id(2), 1, ALIGNED)
    scale = _place(scale, table, tl.program_id(2), 2, False)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    mask = (n < N)[:, None] & (k < K)[None, :]
    value = tl.load(w + at, mask=mask, other=0.0).to(tl.float32)
    amax = tl.max(tl.max(magnitude(value), 1), 0).to(tl.float32, bitcast=True)
    mine = scale_of(amax, codes.dtype.element_ty)
    tl.store(scale + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), mine)
    tl.store(codes + at, encode(value, mine, codes.dtype.element_ty), mask=mask)


@triton.jit
def _amax(table, w, bits, size, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """The largest magnitude of every matrix into its slot, with those that share it."""
    w = _place(w, table, tl.program_id(1), 0, ALIGNED)
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    value = tl.load(w + at, mask=at < size, other=0.0).to(tl.float32)
    slot = tl.load(table + tl.program_id(1) * 4 + 3)
    tl.atomic_max(bits + slot, tl.max(magnitude(value), 0))


@triton.jit
def _encode(table, w, codes, scale, bits, size, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    w = _place(w, table, tl.program_id(1), 0, ALIGNED)
    codes = _place(codes, table, tl.program_id(1), 1, ALIGNED)
    slot = tl.load(table + tl.program_id(1) * 4 + 3)
    amax = tl.load(bits + slot).to(tl.float32, bitcast=True)
    mine = scale_of(amax, codes.dtype.element_ty)
    if tl.program_id(0) == 0:
        scale = _place(scale, table, tl.program_id(1), 2, False)
        tl.store(scale, mine)
    last = tl.num_programs(0) - 1
    at = (last - tl.program_id(0)).to(tl.int64) * TILE + tl.arange(0, TILE)
    value = tl.load(w + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(codes + at, encode(value, mine, codes.dtype.element_ty), mask=at < size)
