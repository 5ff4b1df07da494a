"""Weights to codes on the GPU: `moeq.quantize`, bit for bit; many matrices in a launch.

    block     a program reads 128 x 128 weights, keeps them in registers, writes scale and codes
    channel   a program does so with whole rows; rows that are too long for that it reads twice
    tensor    amax first (a maximum needs no order, so programs may meet in one word), then codes,
              from the end: what was read last is still in L2; the rest is read twice

A table says where the matrices are, so that the experts of a layer, or what a chunk of
a checkpoint brings, cost one launch and not hundreds.

Scales of groups with NaN or Inf come out as NaN or Inf: `moeq.quantize.check_finite` finds them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeq.experts import scale_shape
from moeq.kernels.triton.plans import FP8_CAPABILITY, gpu
from moeq.kernels.triton.rows import BLOCK, encode, magnitude, scale_of
from moeq.schemes import Granularity
from moeq.span import Span

_TILE = 1 << 14
"""Elements of a program where any number will do."""

_ROW, _ROWS = 1 << 14, 1 << 12
"""Elements of a row that a program keeps in registers, and of several shorter ones together."""


def knows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU has the type of the codes: before compute capability 8.9 there is no e4m3."""
    return dtype == torch.int8 or gpu(device).capability >= FP8_CAPABILITY


def quantize_weights(
    weights: Sequence[Span],
    codes: Tensor,
    scales: Tensor,
    codes_at: Sequence[int],
    scales_at: Sequence[int],
    granularity: Granularity,
) -> None:
    """Quantize matrices into final storage.

    Args:
        weights: [N, K] each, of one shape and dtype (fp16, bf16 or fp32), on one GPU.
        codes: int8 or fp8, contiguous; written.
        scales: fp32, contiguous; written.
        codes_at: of every matrix, the element of `codes` where its own N * K begin.
        scales_at: likewise of `scales`, `scale_shape(granularity, (N, K))`. Under
            `Granularity.TENSOR` matrices with the same scale share its amax.
        granularity: what shares a scale.
    """
    n, k = weights[0].shape
    size, count = n * k, math.prod(scale_shape(granularity, (n, k)))
    assert codes.is_contiguous() and scales.is_contiguous()
    if size == 0:
        for at in scales_at:
            scales.view(-1)[at : at + count] = 1.0
        return
    assert 0 <= min(codes_at) and max(codes_at) <= codes.numel() - size
    assert 0 <= min(scales_at) and max(scales_at) <= scales.numel() - count
    first, shape = weights[0].base, weights[0].shape
    dtype, start, itemsize = first.dtype, first.data_ptr(), first.itemsize
    words: dict[int, int] = {}
    table: list[int] = []  # flat: a list for every matrix would take as long as the rest
    bits = k
    for (base, own, its_shape), at, scale_at in zip(weights, codes_at, scales_at):
        assert its_shape == shape and base.dtype is dtype and base.is_contiguous()
        distance = (base.data_ptr() - start) // itemsize + own
        bits |= distance | at
        table += (distance, at, scale_at, words.setdefault(scale_at, len(words)))
    aligned = bits % 16 == 0  # what lets the compiler move 16 bytes at a time
    many = len(weights)
    rows = torch.tensor(table, pin_memory=codes.is_cuda).to(codes.device, non_blocking=True)
    with torch.cuda.device_of(codes):  # Triton launches on the current device
        match granularity:
            case Granularity.CHANNEL:
                wide = min(triton.next_power_of_2(k), _ROW)
                height = max(1, _ROWS // wide)
                _rows[(triton.cdiv(n, height), many)](
                    rows, first, codes, scales, n, k,
                    HEIGHT=height, WIDE=wide, ONCE=wide >= k, ALIGNED=aligned,
                    num_warps=8 if wide > _ROWS else 4,
                )  # fmt: skip
            case Granularity.BLOCK:
                grid = (triton.cdiv(k, 128), triton.cdiv(n, 128), many)
                _blocks[grid](rows, first, codes, scales, n, k, ALIGNED=aligned, num_warps=8)
            case Granularity.TENSOR:
                highest = torch.zeros(len(words), dtype=torch.int32, device=codes.device)
                tiles = triton.cdiv(size, _TILE)
                each = (tiles, many)
                _amax[each](rows, first, highest, size, TILE=_TILE, ALIGNED=aligned, num_warps=8)
                _encode[each](
                    rows, first, codes, scales, highest, size,
                    TILE=_TILE, ALIGNED=aligned, num_warps=8,
                )  # fmt: skip


@triton.jit
def _place(base, table, at, COLUMN: tl.constexpr, ALIGNED: tl.constexpr):
    """Where matrix `at` is, by its distance from `base`: the table holds distances and not
    addresses, because the compiler knows how `base` is aligned."""
    distance = tl.load(table + at * 4 + COLUMN)
    if ALIGNED:
        distance = tl.multiple_of(distance, 16)
    return base + distance


@triton.jit
def _rows(
    table, w, codes, scale, N, K,
    HEIGHT: tl.constexpr, WIDE: tl.constexpr, ONCE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    w = _place(w, table, tl.program_id(1), 0, ALIGNED)
    codes = _place(codes, table, tl.program_id(1), 1, ALIGNED)
    scale = _place(scale, table, tl.program_id(1), 2, False)
    n = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    k = tl.arange(0, WIDE)
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    mask = (n < N)[:, None] & (k < K)[None, :]
    value = tl.load(w + at, mask=mask, other=0.0).to(tl.float32)
    highest = magnitude(value)
    if not ONCE:
        for k0 in range(WIDE, K, WIDE):
            more = (n < N)[:, None] & (k < K - k0)[None, :]
            rest = tl.load(w + at + k0, mask=more, other=0.0).to(tl.float32)
            highest = tl.maximum(highest, magnitude(rest))
    amax = tl.max(highest, 1).to(tl.float32, bitcast=True)
    by_row = scale_of(amax, codes.dtype.element_ty)
    tl.store(scale + n, by_row, mask=n < N)
    tl.store(codes + at, encode(value, by_row[:, None], codes.dtype.element_ty), mask=mask)
    if not ONCE:
        for k0 in range(WIDE, K, WIDE):
            more = (n < N)[:, None] & (k < K - k0)[None, :]
            rest = tl.load(w + at + k0, mask=more, other=0.0).to(tl.float32)
            code = encode(rest, by_row[:, None], codes.dtype.element_ty)
            tl.store(codes + at + k0, code, mask=more)


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
    """The largest magnitude of every matrix into its word, with those that share it."""
    w = _place(w, table, tl.program_id(1), 0, ALIGNED)
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    value = tl.load(w + at, mask=at < size, other=0.0).to(tl.float32)
    word = tl.load(table + tl.program_id(1) * 4 + 3)
    tl.atomic_max(bits + word, tl.max(magnitude(value), 0))


@triton.jit
def _encode(table, w, codes, scale, bits, size, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    w = _place(w, table, tl.program_id(1), 0, ALIGNED)
    codes = _place(codes, table, tl.program_id(1), 1, ALIGNED)
    word = tl.load(table + tl.program_id(1) * 4 + 3)
    amax = tl.load(bits + word).to(tl.float32, bitcast=True)
    mine = scale_of(amax, codes.dtype.element_ty)
    if tl.program_id(0) == 0:
        scale = _place(scale, table, tl.program_id(1), 2, False)
        tl.store(scale, mine)
    last = tl.num_programs(0) - 1
    at = (last - tl.program_id(0)).to(tl.int64) * TILE + tl.arange(0, TILE)
    value = tl.load(w + at, mask=at < size, other=0.0, eviction_policy="evict_first")
    code = encode(value.to(tl.float32), mine, codes.dtype.element_ty)
    tl.store(codes + at, code, mask=at < size, eviction_policy="evict_first")
