"""What happens between and after the GEMMs, row by row: quantize, activate, combine.

`quantize_rows` is `moeq.quantize.quantize_activations`, bit for bit. `combine` adds the k outputs
of every token in fp32, in the order of its slots: the same bits from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeq.kernels.triton.gemm import BLOCK, activate

INT8_MAX = tl.constexpr(127.0)
FP8_MAX = tl.constexpr(448.0)
SCALE_MIN = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def scale_of(amax, CODES: tl.constexpr):
    """fp32 scales from fp32 amaxes; 1 where amax is 0. CODES: the dtype of the codes."""
    qmax = INT8_MAX if CODES == tl.int8 else FP8_MAX
    scale = tl.maximum(tl.div_rn(amax, amax * 0.0 + qmax), SCALE_MIN)
    return tl.where(amax == 0.0, 1.0, scale)


@triton.jit
def encode(x, scale, CODES: tl.constexpr):
    """fp32 values to codes: IEEE quotient, round half to even, clamp."""
    quotient = tl.div_rn(x, scale)
    if CODES == tl.int8:
        # Adding 1.5 * 2^23 leaves no bits for fractions: the hardware rounds half to even.
        quotient = tl.minimum(tl.maximum(quotient, -INT8_MAX), INT8_MAX)
        return ((quotient + 12582912.0) - 12582912.0).to(tl.int8)
    return tl.minimum(tl.maximum(quotient, -FP8_MAX), FP8_MAX).to(CODES)


@triton.jit
def quantize_rows(
    x,
    codes,
    scale,
    K,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [R, K] -> codes [R, K], scale [R] or, with BLOCKS, [R, ceil(K / 128)]. WIDE >= K."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    CODES: tl.constexpr = codes.dtype.element_ty
    r = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDE)
    value = tl.load(x + r * K + k, mask=k < K, other=0.0).to(tl.float32)
    if BLOCKS:
        value = tl.reshape(value, (WIDE // BLOCK, BLOCK))
        by_block = scale_of(tl.max(tl.abs(value), 1), CODES)
        b = tl.arange(0, WIDE // BLOCK)
        grid_k = tl.cdiv(K, BLOCK)
        tl.store(scale + r * grid_k + b, by_block, mask=b < grid_k)
        code = tl.reshape(encode(value, by_block[:, None], CODES), (WIDE,))
    else:
        by_row = scale_of(tl.max(tl.abs(value), 0), CODES)
        tl.store(scale + r, by_row)
        code = encode(value, by_row, CODES)
    tl.store(codes + r * K + k, code, mask=k < K)


@triton.jit
def combine(
    y,
    positions,
    ids,
    topk_weights,
    w_scale,
    bias,
    out,
    E,
    N,
    TOP_K: tl.constexpr,
    SORTED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """y [T * k, N] -> out [T, N]. SORTED: the row of a pair is at its position, else rows are pairs.
    Scale [E, N] and bias [E, N] where y has not seen them. Rows of other ranks' pairs are never
    read."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    acc = tl.zeros((WIDE,), tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        expert = tl.load(ids + pair).to(tl.int64)
        local = (expert >= 0) & (expert < E)
        mask = (n < N) & local
        row = tl.load(positions + pair, mask=local, other=0).to(tl.int64) if SORTED else pair
        value = tl.load(y + row * N + n, mask=mask, other=0.0).to(tl.float32)
        if HAS_SCALE:
            value *= tl.load(w_scale + expert * N + n, mask=mask, other=0.0)
        if HAS_BIAS:
            value += tl.load(bias + expert * N + n, mask=mask, other=0.0).to(tl.float32)
        acc += value * tl.load(topk_weights + pair).to(tl.float32)
    tl.store(out + token * N + n, acc.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def gather_rows(x, out, pairs, offsets, E, K, TOP_K: tl.constexpr, WIDE: tl.constexpr):
    """x [T, K] -> out [P, K]: the row of every sorted pair's token; both seen as bytes or words."""
    r = tl.program_id(0).to(tl.int64)
    if r >= tl.load(offsets + E):
        return
    token = (tl.load(pairs + r) // TOP_K).to(tl.int64)
    k = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    tl.store(out + r * K + k, tl.load(x + token * K + k, mask=k < K), mask=k < K)


@triton.jit
def activate_rows(
    h13,
    w13_scale,
    bias,
    out,
    out_scale,
    pairs,
    ids,
    offsets,
    E,
    N,
    PARTS: tl.constexpr,
    ACT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """h13 [P, PARTS * N], sorted -> out [P, N]: scale, bias, activation, and quantized per row
    where QUANTIZE. Rows past the last local pair are left alone."""
    r = tl.program_id(0).to(tl.int64)
    if r >= tl.load(offsets + E):
        return
    n = tl.arange(0, WIDE)
    inside = n < N
    base = tl.load(ids + tl.load(pairs + r)).to(tl.int64) * (PARTS * N)
    row = h13 + r * (PARTS * N)
    value = tl.load(row + n, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        value *= tl.load(w13_scale + base + n, mask=inside, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + base + n, mask=inside, other=0.0).to(tl.float32)
    value = activate(value, ACT)
    if PARTS == 2:
        up = tl.load(row + N + n, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCALE:
            up *= tl.load(w13_scale + base + N + n, mask=inside, other=0.0)
        if HAS_BIAS:
            up += tl.load(bias + base + N + n, mask=inside, other=0.0).to(tl.float32)
        value *= up
    if QUANTIZE:
        value = tl.where(inside, value, 0.0).to(h13.dtype.element_ty).to(tl.float32)
        scale = scale_of(tl.max(tl.abs(value), 0), out.dtype.element_ty)
        tl.store(out_scale + r, scale)
        value = encode(value, scale, out.dtype.element_ty)
    tl.store(out + r * N + n, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def decode_rows(w, out, FIRST, HEIGHT, N, K, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """w int8 [E, N, K] -> out bf16 [E, HEIGHT, K]: rows FIRST.. of every expert, unscaled."""
    k = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(2).to(tl.int64)
    mask = (n < HEIGHT)[:, None] & (k < K)[None, :]
    codes = tl.load(w + (e * N + FIRST + n[:, None]) * K + k[None, :], mask=mask, other=0)
    tl.store(out + (e * HEIGHT + n[:, None]) * K + k[None, :], codes.to(tl.bfloat16), mask=mask)
