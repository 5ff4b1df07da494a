"""A layer for one or a few tokens: two launches, no routing, no reduction afterwards.

So few rows leave tensor cores nothing to do; what counts is bytes in flight and the time between
launches. `up` gives each (pair, tile of rows) its own program, with the activation at its end.
`down` gives a tile of rows to one program that reads all k experts of a token at once and adds
their outputs in fp32, in the order of the slots.

The weights of the next step are asked for before those of this one are used, and the first ones
before the previous kernel has ended (PDL: programmatic dependent launch): they do not depend on it.

Products are exact in fp32 (int32 for int8 x int8) and accumulated there, one partial sum for every
column of a block, so nothing depends on the shape of a tile but the order of additions.

Codes of four bits (GROUPS) come as words of eight. An int4 becomes four bits in the mantissa of a
number between 1 and 2, one operation each, and what that is more than the code is taken off once a
word, for all rows of the weight: it depends on the activations alone. An e2m1 has its bits moved to
where fp32 has them, which makes a tiny number of it, and the activations are made large.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeq.kernels.triton.gemm import activate, decode_codes
from moeq.kernels.triton.rows import BLOCK, GROUP

_EIGHT = tl.constexpr(8)
"""Codes in a word."""


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
def _columns(x, GROUPS: tl.constexpr):
    """x fp32 [S, K] as the columns of words, [S, K / 8] each, and what a word is to start with.
    int4: those of even columns are 16 times as large, their codes lie 4 bits lower. mxfp4: all are
    2^60 times as large, for codes that are 2^-126 of theirs."""
    if GROUPS == "mxfp4":
        x *= 1152921504606846976.0
    x = tl.reshape(x, (x.shape[0], x.shape[1] // _EIGHT, 2, 2, 2))  # from the right: bit 0, 1, 2
    even, odd = tl.split(x)
    if GROUPS == "int4":
        even *= 16.0
    even, even2 = tl.split(even)
    odd, odd2 = tl.split(odd)
    x0, x4 = tl.split(even)
    x2, x6 = tl.split(even2)
    x1, x5 = tl.split(odd)
    x3, x7 = tl.split(odd2)
    if GROUPS == "int4":
        start = (x0 + x2 + x4 + x6) * -1.03125 + (x1 + x3 + x5 + x7) * -1.5
    else:
        start = tl.zeros_like(x0)
    return start, x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _mantissa(bits, MASK: tl.constexpr):
    """1 and a fraction of these bits."""
    return ((bits & MASK) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _e2m1(bits):
    """2^-126 times the code in the highest four."""
    return ((bits & -2147483648) | ((bits >> 6) & 0x01C00000)).to(tl.float32, bitcast=True)


@triton.jit
def _word_sums(words, group, start, x0, x1, x2, x3, x4, x5, x6, x7, GROUPS: tl.constexpr):
    """Eight code * x of every word (int4: / 16), added up and multiplied by its group scale."""
    if GROUPS == "mxfp4":
        total = tl.fma(_e2m1(words << 28), x0, start)
        total = tl.fma(_e2m1(words << 24), x1, total)
        total = tl.fma(_e2m1(words << 20), x2, total)
        total = tl.fma(_e2m1(words << 16), x3, total)
        total = tl.fma(_e2m1(words << 12), x4, total)
        total = tl.fma(_e2m1(words << 8), x5, total)
        total = tl.fma(_e2m1(words << 4), x6, total)
        total = tl.fma(_e2m1(words), x7, total)
        lift = (group.to(tl.int32) + 66) << 23
        return total * lift.to(tl.float32, bitcast=True)
    LOW: tl.constexpr = 0x00078000
    HIGH: tl.constexpr = 0x00780000
    bits = words << 15
    total = tl.fma(_mantissa(bits, LOW), x0, start)
    total = tl.fma(_mantissa(bits, HIGH), x1, total)
    bits = words << 7
    total = tl.fma(_mantissa(bits, LOW), x2, total)
    total = tl.fma(_mantissa(bits, HIGH), x3, total)
    bits = words >> 1
    total = tl.fma(_mantissa(bits, LOW), x4, total)
    total = tl.fma(_mantissa(bits, HIGH), x5, total)
    bits = words >> 9
    total = tl.fma(_mantissa(bits, LOW), x6, total)
    total = tl.fma(_mantissa(bits, HIGH), x7, total)
    scale = ((group.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -2014314496) + 1006632960
    return total * scale.to(tl.float32, bitcast=True)


@triton.jit
def up(
    x,
    x_scale,
    ids,
    w,
    w_scale,
    w_group,
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
    GROUPS: tl.constexpr,
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
    WIDTH: tl.constexpr = (
        BLOCK_K // _EIGHT if GROUPS != "" else BLOCK_K
    )  # of a tile, in elements of w
    count = tl.cdiv(K, GROUP)
    length = count * (GROUP // _EIGHT) if GROUPS != "" else K
    j = tl.arange(0, WIDTH)
    w_ptrs = (
        w
        + (tl.zeros((), tl.int64) + PARTS * N) * length * expert
        + row.to(tl.int64)[:, None] * length
        + j[None, :]
    )
    if GROUPS != "":
        w_ptrs = tl.multiple_of(tl.max_contiguous(w_ptrs, (1, 2)), (4, 4))
    up_at = (tl.zeros((), tl.int64) + N) * length
    acc = tl.zeros((ROWS, WIDTH), tl.int32 if INTEGER else tl.float32)
    acc_up = acc
    grid_n = tl.cdiv(N, BLOCK)
    grid_k = tl.cdiv(K, BLOCK)
    codes = tl.load(w_ptrs, mask=(j < length)[None, :], other=0.0)
    if PARTS == 2:
        up_codes = tl.load(w_ptrs + up_at, mask=(j < length)[None, :], other=0.0)
    if GROUPS != "":
        g_ptrs = (
            w_group
            + (tl.zeros((), tl.int64) + PARTS * N) * count * expert
            + row.to(tl.int64)[:, None] * count
            + (j // (GROUP // _EIGHT))[None, :]
        )
        g_ptrs = tl.multiple_of(tl.max_contiguous(g_ptrs, (1, 2)), (1, 1))
        group_up_at = (tl.zeros((), tl.int64) + N) * count
        group = tl.load(g_ptrs, mask=(j < length)[None, :], other=0.0)
        if PARTS == 2:
            up_group = tl.load(g_ptrs + group_up_at, mask=(j < length)[None, :], other=0.0)
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
        elif GROUPS != "":
            start, x0, x1, x2, x3, x4, x5, x6, x7 = _columns(xk[None, :], GROUPS)
            acc += _word_sums(codes, group, start, x0, x1, x2, x3, x4, x5, x6, x7, GROUPS)
            if PARTS == 2:
                acc_up += _word_sums(
                    up_codes, up_group, start, x0, x1, x2, x3, x4, x5, x6, x7, GROUPS
                )
        else:
            acc += _values(codes, FP8_BITS, INTEGER) * xk[None, :]
            if PARTS == 2:
                acc_up += _values(up_codes, FP8_BITS, INTEGER) * xk[None, :]
        x_ptrs += BLOCK_K
        w_ptrs += WIDTH
        after = (j < length - k0 // (BLOCK_K // WIDTH) - WIDTH)[None, :]
        codes = tl.load(w_ptrs, mask=after, other=0.0)
        if PARTS == 2:
            up_codes = tl.load(w_ptrs + up_at, mask=after, other=0.0)
        if GROUPS != "":
            g_ptrs += BLOCK_K // GROUP
            group = tl.load(g_ptrs, mask=after, other=0.0)
            if PARTS == 2:
                up_group = tl.load(g_ptrs + group_up_at, mask=after, other=0.0)

    x_factor = tl.load(x_scale + x_row) if MATH == "codes" and SCALES != "block" else 1.0
    if GROUPS == "int4":
        x_factor = 16.0
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
    w_group,
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
    GROUPS: tl.constexpr,
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
    WIDTH: tl.constexpr = (
        BLOCK_K // _EIGHT if GROUPS != "" else BLOCK_K
    )  # of a tile, in elements of w
    count = tl.cdiv(K, GROUP)
    length = count * (GROUP // _EIGHT) if GROUPS != "" else K
    j = tl.arange(0, WIDTH)
    if GROUPS != "":  # [ROWS, SLOTS, WIDTH], so that a thread has the same columns of several rows
        lines = expert.to(tl.int64)[None, :] * N + row.to(tl.int64)[:, None]
        w_ptrs = w + lines[:, :, None] * length + j[None, None, :]
        w_ptrs = tl.multiple_of(tl.max_contiguous(w_ptrs, (1, 2, 4)), (4, 4, 4))
        g_ptrs = w_group + lines[:, :, None] * count + (j // (GROUP // _EIGHT))[None, None, :]
        g_ptrs = tl.multiple_of(tl.max_contiguous(g_ptrs, (1, 2, 4)), (1, 1, 1))
        acc = tl.zeros((ROWS, SLOTS, WIDTH), tl.float32)
        present = local[None, :, None] & (j < length)[None, None, :]
        group = tl.load(g_ptrs, mask=present, other=0.0)
    else:
        w_lines = expert.to(tl.int64)[:, None] * N * K + row.to(tl.int64)[None, :] * K
        w_ptrs = w + w_lines[:, :, None] + k[None, None, :]
        acc = tl.zeros((SLOTS, ROWS, BLOCK_K), tl.int32 if INTEGER else tl.float32)
        present = local[:, None, None] & (k < K)[None, None, :]
    h_ptrs = h + pair.to(tl.int64)[:, None] * K + k[None, :]
    grid_n = tl.cdiv(N, BLOCK)
    grid_k = tl.cdiv(K, BLOCK)
    codes = tl.load(w_ptrs, mask=present, other=0.0)
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
        if GROUPS != "":
            start, x0, x1, x2, x3, x4, x5, x6, x7 = _columns(hk, GROUPS)
            acc += _word_sums(
                codes, group, start[None], x0[None], x1[None], x2[None], x3[None], x4[None],
                x5[None], x6[None], x7[None], GROUPS,
            )  # fmt: skip
            g_ptrs += BLOCK_K // GROUP
            left = length - (k0 + BLOCK_K) // _EIGHT
            after = local[None, :, None] & (j < left)[None, None, :]
            group = tl.load(g_ptrs, mask=after, other=0.0)
        else:
            acc += _values(codes, FP8_BITS, INTEGER) * hk[:, None, :]
            after = local[:, None, None] & (k < K - k0 - BLOCK_K)[None, None, :]
        w_ptrs += WIDTH
        h_ptrs += BLOCK_K
        codes = tl.load(w_ptrs, mask=after, other=0.0)

    y = tl.sum(acc, 2).to(tl.float32)
    if GROUPS != "":
        y = tl.trans(y)
    if GROUPS == "int4":
        y *= 16.0
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
