"""A layer for one or a few tokens: two launches, no routing, no reduction afterwards.

So few rows leave tensor cores nothing to do; what counts is bytes in flight and the time between
launches. `up` gives each (pair, tile of rows) its own program, with the activation at its end.
`down` gives a tile of rows to one program that reads all k experts of a token at once and adds
their outputs in fp32, in the order of the slots.

The weights of the next step are asked for before those of this one are used, and the first ones
before the previous kernel has ended (PDL: programmatic dependent launch): they do not depend on it.

Products are exact in fp32 (int32 for int8 x int8) and accumulated there, one partial sum for every
column of a block, so nothing depends on the shape of a tile but the order of additions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeq.kernels.triton.gemm import activate, decode_codes
from moeq.kernels.triton.rows import BLOCK


@triton.jit
def _values(codes, FP8_BITS: tl.constexpr, INTEGER: tl.constexpr):
    """Codes as fp32 or, for int8 x int8, as int32. An int8 becomes the low bits of
    2^23 + 128 + code, which takes half the instructions of a conversion."""
    if INTEGER:
        return codes.to(tl.int32)
    elif FP8_BITS:
        return decode_codes(codes, tl.bfloat16, FP8_BITS).to(tl.float32)
    elif codes.dtype == tl.int8:
        bits = codes.to(tl.uint8, bitcast=True).to(tl.uint32) ^ 0x4B000080
        return bits.to(tl.float32, bitcast=True) - 8388736.0
    else:
        return codes.to(tl.float32)


@triton.jit
def _by_block(x, factor):
    """x [..., K] times factor [..., K / 128] of its blocks."""
    blocks: tl.constexpr = x.numel // BLOCK
    product = tl.reshape(x, (blocks, BLOCK)) * tl.reshape(factor, (blocks,))[:, None]
    return tl.reshape(product, x.shape)


@triton.jit
def up(
    x,
    x_scale,
    ids,
    w,
    w_scale,
    bias,
    out,
    E,
    N,
    K,
    TOP_K,
    DENSE: tl.constexpr,
    X_PER_PAIR: tl.constexpr,
    PARTS: tl.constexpr,
    ACT: tl.constexpr,
    SCALES: tl.constexpr,
    MATH: tl.constexpr,
    FP8_BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRIGGER: tl.constexpr,
    WAIT: tl.constexpr,
):
    """x [T, K] or [P, K], w [E, PARTS * N, K] -> out [P, N], or [P, PARTS * N] where ACT is "".
    Rows of ids that are not local are zeros. DENSE: E is 1 and ids are not read. TRIGGER, WAIT: see
    `rows.quantize_rows`; weights and ids do not depend on the previous kernel and are read before
    the wait."""
    pair = tl.program_id(1)
    if TRIGGER:
        tl.extra.cuda.gdc_launch_dependents()
    found = 0 if DENSE else tl.load(ids + pair)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    width = N if ACT != "" else PARTS * N
    if (found < 0) | (found >= E):
        if WAIT:  # who waits for this kernel waits for those before it only if it has waited too
            tl.extra.cuda.gdc_wait()
        for part in tl.static_range(PARTS if ACT == "" else 1):
            zero = tl.zeros((ROWS,), tl.float32).to(out.dtype.element_ty)
            tl.store(out + pair * width + part * N + n, zero, mask=n < N)
        return
    expert = 0 if DENSE else found.to(tl.int32)
    INTEGER: tl.constexpr = MATH == "codes" and w.dtype.element_ty == tl.int8
    x_row = pair if X_PER_PAIR else pair // TOP_K
    row = tl.minimum(n, N - 1)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x + x_row.to(tl.int64) * K + k
    w_ptrs = (
        w
        + (tl.zeros((), tl.int64) + PARTS * N) * K * expert
        + row.to(tl.int64)[:, None] * K
        + k[None, :]
    )
    up_at = (tl.zeros((), tl.int64) + N) * K
    acc = tl.zeros((ROWS, BLOCK_K), tl.int32 if INTEGER else tl.float32)
    acc_up = acc
    grid_n = tl.cdiv(N, BLOCK)
    grid_k = tl.cdiv(K, BLOCK)
    codes = tl.load(w_ptrs, mask=(k < K)[None, :], other=0.0)
    if PARTS == 2:
        up_codes = tl.load(w_ptrs + up_at, mask=(k < K)[None, :], other=0.0)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    for k0 in range(0, K, BLOCK_K):
        inside = k < K - k0
        xk = _values(tl.load(x_ptrs, mask=inside, other=0.0), False, INTEGER)
        if SCALES == "block":
            line = expert * (PARTS * grid_n) + tl.program_id(0) * ROWS // BLOCK
            b = k0 // BLOCK + tl.arange(0, BLOCK_K // BLOCK)
            factor = tl.load(w_scale + line * grid_k + b, mask=b < grid_k, other=0.0)
            if MATH == "codes":
                x_factor = tl.load(x_scale + x_row * grid_k + b, mask=b < grid_k, other=0.0)
                xk = _by_block(xk, x_factor)
            acc += _values(codes, FP8_BITS, INTEGER) * _by_block(xk, factor)[None, :]
            if PARTS == 2:
                line += grid_n
                factor = tl.load(w_scale + line * grid_k + b, mask=b < grid_k, other=0.0)
                acc_up += _values(up_codes, FP8_BITS, INTEGER) * _by_block(xk, factor)[None, :]
        else:
            acc += _values(codes, FP8_BITS, INTEGER) * xk[None, :]
            if PARTS == 2:
                acc_up += _values(up_codes, FP8_BITS, INTEGER) * xk[None, :]
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
        after = (k < K - k0 - BLOCK_K)[None, :]
        codes = tl.load(w_ptrs, mask=after, other=0.0)
        if PARTS == 2:
            up_codes = tl.load(w_ptrs + up_at, mask=after, other=0.0)

    x_factor = tl.load(x_scale + x_row) if MATH == "codes" and SCALES != "block" else 1.0
    base = expert * (PARTS * N)
    gate = tl.sum(acc, 1).to(tl.float32) * x_factor
    up_ = tl.sum(acc_up, 1).to(tl.float32) * x_factor
    if SCALES == "tensor":
        gate *= tl.load(w_scale + expert)
        up_ *= tl.load(w_scale + expert)
    elif SCALES == "channel":
        gate *= tl.load(w_scale + base + row)
        if PARTS == 2:
            up_ *= tl.load(w_scale + base + N + row)
    if HAS_BIAS:
        gate += tl.load(bias + base + row).to(tl.float32)
        if PARTS == 2:
            up_ += tl.load(bias + base + N + row).to(tl.float32)
    target = out + pair * width + n
    if ACT == "":
        tl.store(target, gate.to(out.dtype.element_ty), mask=n < N)
        if PARTS == 2:
            tl.store(target + N, up_.to(out.dtype.element_ty), mask=n < N)
    else:
        h = activate(gate, ACT)
        if PARTS == 2:
            h *= up_
        tl.store(target, h.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def down(
    h,
    h_scale,
    ids,
    topk_weights,
    w,
    w_scale,
    bias,
    out,
    E,
    N,
    K,
    TOP_K,
    SLOTS: tl.constexpr,
    SCALES: tl.constexpr,
    MATH: tl.constexpr,
    FP8_BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """h [T * k, K], w [E, N, K] -> out [T, N]. SLOTS: k rounded up to a power of two."""
    token = tl.program_id(1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(n, N - 1)
    slot = tl.arange(0, SLOTS)
    INTEGER: tl.constexpr = MATH == "codes" and w.dtype.element_ty == tl.int8
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    found = tl.load(ids + token * TOP_K + slot, mask=slot < TOP_K, other=-1)
    local = (slot < TOP_K) & (found >= 0) & (found < E)
    expert = tl.where(local, found, 0).to(tl.int32)
    pair = token * TOP_K + tl.minimum(slot, TOP_K - 1)
    k = tl.arange(0, BLOCK_K)
    w_lines = expert.to(tl.int64)[:, None] * N * K + row.to(tl.int64)[None, :] * K
    w_ptrs = w + w_lines[:, :, None] + k[None, None, :]
    h_ptrs = h + pair.to(tl.int64)[:, None] * K + k[None, :]
    grid_n = tl.cdiv(N, BLOCK)
    grid_k = tl.cdiv(K, BLOCK)
    acc = tl.zeros((SLOTS, ROWS, BLOCK_K), tl.int32 if INTEGER else tl.float32)
    first = local[:, None] & (k < K)[None, :]
    codes = tl.load(w_ptrs, mask=first[:, None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for k0 in range(0, K, BLOCK_K):
        inside = local[:, None] & (k < K - k0)[None, :]
        hk = _values(tl.load(h_ptrs, mask=inside, other=0.0), False, INTEGER)
        if SCALES == "block":
            line = expert * grid_n + tl.program_id(0) * ROWS // BLOCK
            b = k0 // BLOCK + tl.arange(0, BLOCK_K // BLOCK)[None, :]
            factor = tl.load(w_scale + line[:, None] * grid_k + b, mask=b < grid_k, other=0.0)
            if MATH == "codes":
                h_line = h_scale + pair[:, None] * grid_k
                factor *= tl.load(h_line + b, mask=b < grid_k, other=0.0)
            hk = _by_block(hk, factor)
        acc += _values(codes, FP8_BITS, INTEGER) * hk[:, None, :]
        w_ptrs += BLOCK_K
        h_ptrs += BLOCK_K
        after = local[:, None] & (k < K - k0 - BLOCK_K)[None, :]
        codes = tl.load(w_ptrs, mask=after[:, None, :], other=0.0)

    y = tl.sum(acc, 2).to(tl.float32)
    if SCALES != "block" and MATH == "codes":
        y *= tl.load(h_scale + pair)[:, None]
    if SCALES == "tensor":
        y *= tl.load(w_scale + expert)[:, None]
    elif SCALES == "channel":
        y *= tl.load(w_scale + expert[:, None] * N + row[None, :])
    if HAS_BIAS:
        y += tl.load(bias + expert[:, None] * N + row[None, :]).to(tl.float32)
    weight = tl.load(topk_weights + pair).to(tl.float32)
    y = tl.sum(tl.where(local[:, None], y * weight[:, None], 0.0), 0)
    tl.store(out + token.to(tl.int64) * N + n, y.to(out.dtype.element_ty), mask=n < N)
