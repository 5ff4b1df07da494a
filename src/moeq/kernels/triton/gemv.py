"""A layer for one or a few tokens: two launches, no routing, no reduction afterwards.

So few rows leave tensor cores nothing to do; what counts is bytes in flight and the time between
launches. `up` gives each (pair, tile of rows) its own program, with the activation at its end.
`down` gives a tile of rows to one program that reads all k experts of a token at once and adds
their outputs in fp32, in the order of the slots.

The weights of the next step are asked for before those of this one are used, and the first ones
before the previous kernel has ended (PDL: programmatic dependent launch): they do not depend on it.

Products are exact in fp32 (int32 for int8 x int8) and accumulated there, one partial sum for every
column of a block, so nothing depends on the shape of a tile but the order of additions.

Codes of four bits (GROUPS, `_rows_by_group`) come as words of eight, a thread has whole groups of
several rows. `decode.fractions` makes fp32 numbers of a word in little more than an operation each;
what they are more than the codes is taken off once a group, for all rows: it depends on the
activations alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeq.kernels.triton.decode import WORDS, columns, decode_codes, fractions, step_scale
from moeq.kernels.triton.gemm import activate
from moeq.kernels.triton.rows import BLOCK, GROUP


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
def _rows_by_group(
    x,
    x_line,
    w,
    w_group,
    line,
    present,
    K,
    GROUPS: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Lines of w [*, K] times rows of x, without the scales of rows: fp32 [ROWS, LINES].

    line int64 [ROWS, LINES]; x_line int64 [LINES], or [1] for all; present [LINES]: whether a
    line's result is of use."""
    COUNT: tl.constexpr = BLOCK_K // GROUP
    count = tl.cdiv(K, GROUP)
    g = tl.arange(0, COUNT)[None, None, :]
    word = tl.arange(0, COUNT * WORDS)[None, None, :]
    k = tl.arange(0, BLOCK_K)[None, :]
    here = present[None, :, None]
    at = line[:, :, None] * count
    w_ptrs = w + at * WORDS + word
    # The compiler would give a thread several neighbours if it knew how they are aligned
    g_ptrs = tl.multiple_of(tl.max_contiguous(w_group + at + g, (1, 1, 2)), (1, 1, 1))
    x_ptrs = x + x_line[:, None] * K + k
    words = tl.load(w_ptrs, mask=here & (word < count * WORDS), other=0)
    group = tl.load(g_ptrs, mask=here & (g < count), other=0)
    acc = tl.zeros((line.shape[0], line.shape[1], COUNT), tl.float32)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    for k0 in range(0, K, BLOCK_K):
        xk = tl.load(x_ptrs, mask=k < K - k0, other=0.0).to(tl.float32)
        x_ptrs += BLOCK_K
        w_ptrs += COUNT * WORDS
        g_ptrs += COUNT
        rest = count - k0 // GROUP - COUNT
        next_words = tl.load(w_ptrs, mask=here & (word < rest * WORDS), other=0)
        next_group = tl.load(g_ptrs, mask=here & (g < rest), other=0)
        xk, start = columns(tl.reshape(xk, (x_line.shape[0], COUNT, GROUP)), GROUPS)
        fraction = fractions(words, GROUPS, PTX)
        acc += (tl.sum(fraction * xk[None], 3) + start[None]) * step_scale(group, GROUPS)
        words, group = next_words, next_group
    return tl.sum(acc, 2)


@triton.jit
def _rows_of_up(
    x,
    x_scale,
    x_row,
    w,
    w_scale,
    expert,
    row,
    N,
    K,
    PARTS: tl.constexpr,
    SCALES: tl.constexpr,
    MATH: tl.constexpr,
    FP8_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Rows of w [E, PARTS * N, K] times a row of x, fp32 [ROWS] of either projection, without what
    is the same for all of a row."""
    INTEGER: tl.constexpr = MATH == "codes" and w.dtype.element_ty == tl.int8
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
        xk = _values(tl.load(x_ptrs, mask=k < K - k0, other=0.0), False, INTEGER)
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
    return tl.sum(acc, 1).to(tl.float32), tl.sum(acc_up, 1).to(tl.float32)


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
    PTX: tl.constexpr,
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
    x_row = pair if X_PER_PAIR else pair // TOP_K
    row = tl.minimum(n, N - 1)
    if GROUPS != "":
        part = tl.arange(0, PARTS)
        first = (tl.zeros((), tl.int64) + PARTS * N) * expert
        line = first + (part * N)[None, :] + row.to(tl.int64)[:, None]
        x_line = tl.zeros((1,), tl.int64) + x_row
        gate = _rows_by_group(
            x, x_line, w, w_group, line, part < PARTS, K, GROUPS, PTX, BLOCK_K, WAIT
        )
        if PARTS == 2:
            gate, up_ = tl.split(gate)
        else:
            gate = tl.reshape(gate, (ROWS,))
            up_ = gate
    else:
        gate, up_ = _rows_of_up(
            x, x_scale, x_row, w, w_scale, expert, row, N, K, PARTS, SCALES, MATH, FP8_BITS,
            ROWS, BLOCK_K, WAIT,
        )  # fmt: skip

    x_factor = tl.load(x_scale + x_row) if MATH == "codes" and SCALES != "block" else 1.0
    base = expert * (PARTS * N)
    gate *= x_factor
    up_ *= x_factor
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
def _rows_of_down(
    h,
    h_scale,
    pair,
    w,
    w_scale,
    expert,
    row,
    local,
    N,
    K,
    SCALES: tl.constexpr,
    MATH: tl.constexpr,
    FP8_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of w [E, N, K] times the rows of h of a token's slots, fp32 [SLOTS, ROWS], without what
    is the same for all of a row."""
    INTEGER: tl.constexpr = MATH == "codes" and w.dtype.element_ty == tl.int8
    k = tl.arange(0, BLOCK_K)
    lines = expert.to(tl.int64)[:, None] * N * K + row.to(tl.int64)[None, :] * K
    w_ptrs = w + lines[:, :, None] + k[None, None, :]
    acc = tl.zeros((pair.shape[0], ROWS, BLOCK_K), tl.int32 if INTEGER else tl.float32)
    h_ptrs = h + pair.to(tl.int64)[:, None] * K + k[None, :]
    grid_n = tl.cdiv(N, BLOCK)
    grid_k = tl.cdiv(K, BLOCK)
    present = local[:, None, None]
    codes = tl.load(w_ptrs, mask=present & (k < K)[None, None, :], other=0.0)
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
        after = present & (k < K - k0 - BLOCK_K)[None, None, :]
        codes = tl.load(w_ptrs, mask=after, other=0.0)
    return tl.sum(acc, 2).to(tl.float32)


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
    PTX: tl.constexpr,
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
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    found = tl.load(ids + token * TOP_K + slot, mask=slot < TOP_K, other=-1)
    local = (slot < TOP_K) & (found >= 0) & (found < E)
    expert = tl.where(local, found, 0).to(tl.int32)
    pair = token * TOP_K + tl.minimum(slot, TOP_K - 1)
    if GROUPS != "":
        line = expert.to(tl.int64)[None, :] * N + row.to(tl.int64)[:, None]
        y = _rows_by_group(
            h, pair.to(tl.int64), w, w_group, line, local, K, GROUPS, PTX, BLOCK_K, PDL
        )
        y = tl.trans(y)
    else:
        y = _rows_of_down(
            h, h_scale, pair, w, w_scale, expert, row, local, N, K, SCALES, MATH, FP8_BITS,
            ROWS, BLOCK_K, PDL,
        )  # fmt: skip
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
