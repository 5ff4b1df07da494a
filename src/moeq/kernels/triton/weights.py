"""Weights to codes on the GPU: `moeq.quantize`, bit for bit.

    block     a program reads 128 x 128 weights, keeps them in registers, writes scale and codes
    channel   a program goes twice over some rows; the second time they come from L1
    tensor    amax first (a maximum needs no order, so programs may meet in one word), then codes,
              from the end: what was read last is still in L2. A matrix that does not fit there
              is read twice

Scales of groups with NaN or Inf come out as NaN or Inf: `moeq.quantize.check_finite` finds them.
"""

from __future__ import annotations

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


def quantize_weight(weight: Tensor, granularity: Granularity, codes: Tensor, scale: Tensor) -> None:
    """Quantize one matrix into final storage.

    Args:
        weight: [N, K], fp16, bf16 or fp32, on the GPU.
        granularity: what shares a scale.
        codes: [N, K], written, int8 or fp8; contiguous.
        scale: fp32, `scale_shape(granularity, weight.shape)`, written; contiguous.
    """
    assert codes.is_contiguous() and scale.is_contiguous()
    assert tuple(scale.shape) == scale_shape(granularity, tuple(weight.shape)), scale.shape
    weight = weight.contiguous()
    n, k = weight.shape
    if weight.numel() == 0:
        scale.fill_(1.0)
        return
    with torch.cuda.device_of(codes):  # Triton launches on the current device
        match granularity:
            case Granularity.CHANNEL:
                step = min(_STEP, triton.next_power_of_2(k))
                rows = (triton.cdiv(n, _HEIGHT),)
                _rows[rows](weight, codes, scale, n, k, HEIGHT=_HEIGHT, STEP=step, num_warps=4)
            case Granularity.BLOCK:
                grid = (triton.cdiv(k, 128), triton.cdiv(n, 128))
                _blocks[grid](weight, codes, scale, n, k, num_warps=8)
            case Granularity.TENSOR:
                encode_weight(weight, weight_amax(weight), codes, scale)


def weight_amax(weight: Tensor) -> Tensor:
    """Largest magnitude of a contiguous matrix on the GPU: fp32 [], NaN if it has one."""
    bits = torch.zeros((), dtype=torch.int32, device=weight.device)
    if weight.numel():
        grid = (triton.cdiv(weight.numel(), _TILE),)
        _amax[grid](weight, bits, weight.numel(), TILE=_TILE, num_warps=8)
    return bits.view(torch.float32)


def encode_weight(weight: Tensor, amax: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Codes [N, K] and scale [] of a contiguous matrix under a given amax []."""
    grid = (max(1, triton.cdiv(weight.numel(), _TILE)),)
    with torch.cuda.device_of(codes):
        _encode[grid](weight, amax, codes, scale, weight.numel(), TILE=_TILE, num_warps=8)


@triton.jit
def _rows(w, codes, scale, N, K, HEIGHT: tl.constexpr, STEP: tl.constexpr):
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
def _blocks(w, codes, scale, N, K):
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
def _amax(w, bits, size, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    value = tl.load(w + at, mask=at < size, other=0.0).to(tl.float32)
    tl.atomic_max(bits, tl.max(magnitude(value), 0))


@triton.jit
def _encode(w, amax, codes, scale, size, TILE: tl.constexpr):
    mine = scale_of(tl.load(amax), codes.dtype.element_ty)
    if tl.program_id(0) == 0:
        tl.store(scale, mine)
    last = tl.num_programs(0) - 1
    at = (last - tl.program_id(0)).to(tl.int64) * TILE + tl.arange(0, TILE)
    value = tl.load(w + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(codes + at, encode(value, mine, codes.dtype.element_ty), mask=at < size)
