"""Weights to codes on the GPU: `moeq.quantize`, bit for bit; many matrices in a launch.

    block     a program reads 128 x 128 weights, keeps them in registers, writes scale and codes
    channel   a program does so with whole rows; rows that are too long for that it reads twice
    tensor    amax first (a maximum needs no order, so programs may meet in one word), then codes,
              from the end: what was read last is still in L2; the rest is read twice
    groups    `moeq.four_bits`: as channel; a thread holds whole groups, so that sums over them,
              for every candidate, need no other thread

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
from moeq.four_bits import GROUP_BYTES, packed
from moeq.four_bits import groups as groups_of
from moeq.kernels.triton.plans import FP8_CAPABILITY, gpu
from moeq.kernels.triton.rows import BLOCK, GROUP, GROUPS, SCALE_MIN, encode, magnitude, scale_of
from moeq.schemes import Granularity
from moeq.span import Span

_TILE = 1 << 14
"""Elements of a program where any number will do."""

_ROW, _ROWS = 1 << 14, 1 << 12
"""Elements of a row that a program keeps in registers, and of several shorter ones together."""

_E4M3_BIAS = tl.constexpr(120 << 3)
_E4M3_LEAST = tl.constexpr(0x08)
"""As in `moeq.int4`."""

_E8M0_LEAST = tl.constexpr(10)
"""As in `moeq.mxfp4`."""


def knows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU has the type of the codes: before compute capability 8.9 there is no e4m3.
    Scales of groups are written as bits."""
    return dtype != torch.float8_e4m3fn or gpu(device).capability >= FP8_CAPABILITY


def quantize_weights(
    weights: Sequence[Span],
    codes: Tensor,
    scales: Tensor,
    codes_at: Sequence[int],
    scales_at: Sequence[int],
    granularity: Granularity,
    groups: Tensor | None = None,
    groups_at: Sequence[int] = (),
) -> None:
    """Quantize matrices into final storage.

    Args:
        weights: [N, K] each, of one shape and dtype (fp16, bf16 or fp32), on one GPU.
        codes: int8 or fp8, or uint8 where there are groups, contiguous; written.
        scales: fp32, contiguous; written.
        codes_at: of every matrix, the element of `codes` where its own N * K (of groups
            N * packed(K)) begin.
        scales_at: likewise of `scales`, `scale_shape(granularity, (N, K))`. Under
            `Granularity.TENSOR` matrices with the same scale share its amax.
        granularity: what shares a scale.
        groups: a key of `four_bits.CODES`, contiguous: codes have four bits; written.
        groups_at: of every matrix, the element of `groups` where its own N * groups(K) begin.
    """
    n, k = weights[0].shape
    size, count = n * k, math.prod(scale_shape(granularity, (n, k)))
    room = size if groups is None else n * packed(k)
    assert codes.is_contiguous() and scales.is_contiguous()
    if size == 0:
        for at in scales_at:
            scales.view(-1)[at : at + count] = 1.0
        return
    assert 0 <= min(codes_at) and max(codes_at) <= codes.numel() - room
    assert 0 <= min(scales_at) and max(scales_at) <= scales.numel() - count
    first, shape = weights[0].base, weights[0].shape
    dtype, start, itemsize = first.dtype, first.data_ptr(), first.itemsize
    if groups is not None:
        assert codes.dtype == torch.uint8 and groups.is_contiguous(), (codes.dtype, groups.stride())
        assert codes.data_ptr() % GROUP_BYTES == 0, codes.data_ptr()
        assert 0 <= min(groups_at) and max(groups_at) <= groups.numel() - n * groups_of(k)
    words: dict[int, int] = {}
    table: list[int] = []  # flat: a list for every matrix would take as long as the rest
    bits = k
    for index, ((base, own, its_shape), at, scale_at) in enumerate(
        zip(weights, codes_at, scales_at)
    ):
        assert its_shape == shape and base.dtype is dtype and base.is_contiguous()
        distance = (base.data_ptr() - start) // itemsize + own
        bits |= distance | at
        last = words.setdefault(scale_at, len(words)) if groups is None else groups_at[index]
        table += (distance, at, scale_at, last)
    aligned = bits % 16 == 0  # what lets the compiler move 16 bytes at a time
    many = len(weights)
    rows = torch.tensor(table, pin_memory=codes.is_cuda).to(codes.device, non_blocking=True)
    with torch.cuda.device_of(codes):  # Triton launches on the current device
        if groups is not None:
            wide, height, warps = _cut(k)
            _groups[(triton.cdiv(n, height), many)](
                rows, first, codes.view(-1).view(torch.int32), scales, groups.view(torch.uint8),
                n, k, groups_of(k),
                HEIGHT=height, WIDE=wide, ONCE=wide >= k, ALIGNED=aligned,
                GROUPS=GROUPS[groups.dtype], num_warps=warps,
            )  # fmt: skip
            return
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


def _cut(k: int) -> tuple[int, int, int]:
    """Of `_groups`: columns that a program takes at a time, rows, and its warps."""
    count = groups_of(k)
    wide = min(triton.next_power_of_2(count), 512)
    while wide > 8 and -(-count // wide) * wide > 1.13 * count:
        wide //= 2  # what is beyond a row costs as much as what is not
    threads = max(128, wide)
    return wide * GROUP.value, threads // wide, threads // 32


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


@triton.jit
def _groups(
    table, w, codes, scale, groups, N, K, COUNT,
    HEIGHT: tl.constexpr, WIDE: tl.constexpr, ONCE: tl.constexpr, ALIGNED: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """HEIGHT rows of COUNT groups, WIDE columns at a time; codes: words of eight."""
    w = _place(w, table, tl.program_id(1), 0, ALIGNED)
    codes += tl.load(table + tl.program_id(1) * 4 + 1) // 4
    scale = _place(scale, table, tl.program_id(1), 2, False)
    groups = _place(groups, table, tl.program_id(1), 3, False)
    n = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    a, b, c, d = _group_chunks(w, n, 0, N, K, WIDE)
    if ONCE:
        high, low = _highest(a, b, c, d), _highest(-a, -b, -c, -d)
        highest = tl.max(tl.maximum(magnitude(high), magnitude(low)), 1)
    else:
        amax = _amax_of(a, b, c, d)
        for k0 in range(WIDE, K, WIDE):
            a, b, c, d = _group_chunks(w, n, k0, N, K, WIDE)
            amax = tl.maximum(amax, _amax_of(a, b, c, d), propagate_nan=tl.PropagateNan.ALL)
        highest = tl.max(tl.max(magnitude(amax), 2), 1)
    power = (highest & 0x7F800000).to(tl.float32, bitcast=True) * 0.0009765625  # 2^-10
    by_row = tl.where(highest == 0, 1.0, tl.maximum(power, SCALE_MIN))
    tl.store(scale + n, by_row, mask=n < N)
    inverse = (0x7F000000 - by_row.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    if ONCE:
        _store_groups(a, b, c, d, inverse, codes, groups, n, 0, N, COUNT, GROUPS)
    else:
        for k0 in range(0, K, WIDE):
            a, b, c, d = _group_chunks(w, n, k0, N, K, WIDE)
            _store_groups(a, b, c, d, inverse, codes, groups, n, k0 // GROUP, N, COUNT, GROUPS)


@triton.jit
def _group_chunks(w, n, k0, N, K, WIDE: tl.constexpr):
    """Rows n, columns [k0, k0 + WIDE): the first, second, .. eight columns of every group, each
    fp32 [rows, groups, 8]. So a thread has whole groups, and no sum over one needs another."""
    line = w + n.to(tl.int64)[:, None, None] * K
    k = k0 + tl.arange(0, WIDE // GROUP)[None, :, None] * GROUP + tl.arange(0, 8)[None, None, :]
    rows = (n < N)[:, None, None]
    a = tl.load(line + k, mask=rows & (k < K), other=0.0).to(tl.float32)
    b = tl.load(line + (k + 8), mask=rows & (k + 8 < K), other=0.0).to(tl.float32)
    c = tl.load(line + (k + 16), mask=rows & (k + 16 < K), other=0.0).to(tl.float32)
    d = tl.load(line + (k + 24), mask=rows & (k + 24 < K), other=0.0).to(tl.float32)
    return a, b, c, d


@triton.jit
def _halves(x):
    """[..., 2 * M] -> [..., M] twice: even and odd columns."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))


@triton.jit
def _highest(a, b, c, d):
    """Of chunks of groups: [rows, groups]. NaN stays."""
    x = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    y = tl.maximum(c, d, propagate_nan=tl.PropagateNan.ALL)
    x = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    x, y = _halves(x)
    x = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    x, y = _halves(x)
    x = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    x, y = tl.split(x)
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _amax_of(a, b, c, d):
    """The largest magnitude of four; NaN stays."""
    x = tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL)
    y = tl.maximum(tl.abs(c), tl.abs(d), propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store_groups(
    a, b, c, d, inverse, codes, groups, n, g0, N, COUNT, GROUPS: tl.constexpr
):  # fmt: skip
    """`moeq.four_bits.quantize` of chunks of columns, under the reciprocals of the scales of
    rows."""
    if GROUPS == "mxfp4":
        byte, words = _mxfp4(a, b, c, d, inverse)
    else:
        byte, words = _int4(a, b, c, d, inverse)
    g = g0 + tl.arange(0, byte.shape[1])
    at = n.to(tl.int64)[:, None] * COUNT + g[None, :]
    mask = (n < N)[:, None] & (g < COUNT)[None, :]
    tl.store(groups + at, byte.to(tl.uint8), mask=mask)
    tl.store(codes + at[:, :, None] * 4 + tl.arange(0, 4), words, mask=mask[:, :, None])


@triton.jit
def _mxfp4(a, b, c, d, inverse):
    """`moeq.mxfp4.encode`: group scales, and four words of codes."""
    amax = _amax_of(a, b, c, d)
    x, y = _halves(amax)
    x, y = _halves(tl.maximum(x, y))
    x, y = tl.split(tl.maximum(x, y))
    bits = magnitude(tl.maximum(x, y) * inverse[:, None])
    exponent = tl.maximum(bits >> 23, _E8M0_LEAST + 2)
    lift = ((264 - exponent) << 23).to(tl.float32, bitcast=True)
    a = _rounded(a * inverse[:, None, None] * lift[:, :, None])
    b = _rounded(b * inverse[:, None, None] * lift[:, :, None])
    c = _rounded(c * inverse[:, None, None] * lift[:, :, None])
    d = _rounded(d * inverse[:, None, None] * lift[:, :, None])
    wider = _better(a, b, c, d) < 4.0 * _worse(a, b, c, d)
    step = tl.where(wider, 0x44000000, 0x43800000)[:, :, None]  # 512 or 256
    words = tl.join(
        tl.join(_e2m1_words(a, step), _e2m1_words(c, step)),
        tl.join(_e2m1_words(b, step), _e2m1_words(d, step)),
    )
    byte = exponent - 2 + wider.to(tl.int32)
    return byte, tl.reshape(words, (byte.shape[0], byte.shape[1], 4))


@triton.jit
def _e2m1(x, step):
    """x as one of e2m1's numbers, or as 8, times a step, a power of two as bits of fp32. Half to
    even, as the hardware adds: what is added leaves one bit after the first, and half a step."""
    binade = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, step)
    lift = (binade + 0x0B400000).to(tl.float32, bitcast=True)  # 1.5 * 2^22 times as much
    return (x + lift) - lift


@triton.jit
def _better(a, b, c, d):
    """By how much the squared errors of a group are less under a step of 256 than under 512 because
    numbers below 512 lie closer, over 256: a sum of triangles, on 128 and on 384."""
    return tl.sum(_triangle(a) + _triangle(b) + _triangle(c) + _triangle(d), 2)


@triton.jit
def _triangle(x):
    return tl.maximum(64.0 - tl.abs(tl.abs(tl.abs(x) - 256.0) - 128.0), 0.0)


@triton.jit
def _worse(a, b, c, d):
    """And by how much more because 512 goes on to 2048 where 256 ends at 1536, over 1024."""
    return tl.sum(_beyond(a) + _beyond(b) + _beyond(c) + _beyond(d), 2)


@triton.jit
def _beyond(x):
    return tl.maximum(tl.abs(x) - 1792.0, 0.0)


@triton.jit
def _e2m1_words(x, step):
    """x [rows, groups, 8] as codes under steps as bits of fp32, eight to an int32: [rows, groups].
    Where a step is 2^-126, fp32 is e2m1 with more of everything, numbers below a step too."""
    unit = ((0x44800000 - step) >> 9).to(tl.float32, bitcast=True)  # 2^-126 / step
    bits = (_e2m1(x, step) * unit).to(tl.int32, bitcast=True)
    code = tl.minimum((bits & 0x7FFFFFFF) >> 22, 7) + ((bits >> 28) & 8)
    return _packed(code)


@triton.jit
def _int4(a, b, c, d, inverse):
    """`moeq.int4.encode`: group scales, and four words of codes."""
    high = _highest(a, b, c, d) * inverse[:, None]
    low = _highest(-a, -b, -c, -d) * inverse[:, None]
    bits = magnitude(tl.maximum(high, low))
    least = (bits >> 20) - (_E4M3_BIAS + 24)
    # 2^10 over the group's power of two: what makes integers of it
    lift = ((264 - (tl.maximum(bits, 121 << 23) >> 23)) << 23).to(tl.float32, bitcast=True)
    a = _rounded(a * inverse[:, None, None] * lift[:, :, None])
    b = _rounded(b * inverse[:, None, None] * lift[:, :, None])
    c = _rounded(c * inverse[:, None, None] * lift[:, :, None])
    d = _rounded(d * inverse[:, None, None] * lift[:, :, None])
    lift = tl.where(high >= low, -lift, lift)
    byte = tl.zeros_like(least)
    fewest = lift * 0.0 + float("inf")
    for index in tl.static_range(4):
        # 0, 1, -1, 2
        candidate = tl.maximum(least + (index if index < 2 else 3 * index - 7), _E4M3_LEAST)
        value = ((candidate + _E4M3_BIAS) << 20).to(tl.float32, bitcast=True) * lift
        fifteenth = (0.06666667 / value)[:, :, None]
        value = value[:, :, None]
        squares = _square(a, value, fifteenth) + _square(b, value, fifteenth)
        squares += _square(c, value, fifteenth)
        squares += _square(d, value, fifteenth)
        error = tl.sum(squares, 2)
        byte = tl.where(error < fewest, candidate, byte)
        fewest = tl.minimum(fewest, error)
    value = ((byte + _E4M3_BIAS) << 20).to(tl.float32, bitcast=True) * lift
    by_group = tl.div_rn(value * 0.0 + 1.0, value)[:, :, None]
    words = tl.join(
        tl.join(_words(a, by_group), _words(c, by_group)),
        tl.join(_words(b, by_group), _words(d, by_group)),
    )
    byte |= tl.where(high >= low, 0x80, 0)
    return byte, tl.reshape(words, (byte.shape[0], byte.shape[1], 4))


@triton.jit
def _rounded(x):
    """Half to even, as the hardware adds: 1.5 * 2^23 leaves no bits for fractions."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _square(x, value, fifteenth):
    """The squared error of x under a group scale. A tie may go either way here: both errors are the
    same. So the limits of codes can be 0 and 1, which are free."""
    code = tl.minimum(tl.maximum(tl.fma(x, fifteenth, 0.53333336), 0.0), 1.0)
    error = tl.fma(12582920.0 - (code * 15.0 + 12582912.0), value, x)
    return error * error


@triton.jit
def _words(x, by_group):
    """x [rows, groups, 8] as codes, eight to an int32: [rows, groups]. As fp32 a code has 3 * 2^22
    more than its own, in bits 0x4B400000: what eight of that add up to is taken off at once."""
    quotient = tl.minimum(tl.maximum(x * by_group, -8.0), 7.0)
    return _packed((quotient + 12582920.0).to(tl.int32, bitcast=True)) - 0x3F400000


@triton.jit
def _packed(codes):
    """[rows, groups, 8], the even in the low bits: [rows, groups]."""
    even, odd = _halves(codes)
    even, odd = _halves(even + odd * 16)
    even, odd = tl.split(even + odd * 256)
    return even + odd * 65536
