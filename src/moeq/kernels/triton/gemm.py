"""One grouped GEMM for every scheme: tiles of (rows of one expert) x (rows of its weight).

    out[r] = epilogue(x[row(r)] @ w[expert(r)].T * x_scale * w_scale + bias)

`moeq.kernels.triton.routing` sorts the (token, expert) pairs by expert and cuts each expert's rows
into tiles of BLOCK_M; a program takes one such tile and BLOCK_N rows of the weight. With a gate,
the rows of a weight tile alternate between gate and up, so that a thread of the accumulator holds
both values of a column and the activation runs in registers.

How codes meet rows (`MATH`):

    "codes"    both are int8, or both fp8: tensor cores multiply them as they are. int8 accumulates
               in int32, exactly. fp8 accumulates with about 14 bits inside the tensor core; PROMOTE
               adds every BLOCK_K products to an fp32 accumulator instead.
    "decode"   codes become the dtype of the rows (exactly: int8 and e4m3 fit into bf16 and fp16)
               and the scale is applied to the result. Codes of four bits (GROUPS: "int4",
               "mxfp4"; `moeq.four_bits`) are multiplied by the scale of their group on the way,
               which is exact, too.

Scales of blocks are applied once per 128 columns, as one factor per row of the accumulator and
projection. SWAP computes the transposed product, so that few rows fill the narrow side of the
tensor core's tile. With four warps or more it is only for "codes": decoded weights as left operand
would be read from registers, which ptxas before 13.3 compiles wrongly for Hopper (triton issue
9433); fewer warps use the instructions of Ampere.

Legend: R sorted rows, E experts, N rows of one projection, K columns; see `moeq.experts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeq.kernels.triton.decode import (
    MXFP4_LIFT,
    WORD,
    WORDS,
    decode_codes,
    decode_words,
    own_groups,
)
from moeq.kernels.triton.rows import BLOCK, GROUP


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The elementwise functions of `moeq.kernels.activations`, on fp32."""
    if ACT == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x - x / (1.0 + tl.exp(2.0 * u))
    elif ACT == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "relu2":
        r = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return r * r
    else:
        return x


@triton.jit
def _rows_of(inner, pairs, TOP_K, WHICH: tl.constexpr):
    """Rows of a tensor that belong to sorted rows: "sorted" themselves, "pair" their pair (token,
    slot), "token" their token."""
    if WHICH == "sorted":
        return inner
    elif WHICH == "pair":
        return tl.load(pairs + inner)
    else:
        return tl.load(pairs + inner) // TOP_K


@triton.jit
def grouped_gemm(
    x,
    x_scale,
    w,
    w_scale,
    w_group,
    bias,
    out,
    pairs,
    offsets,
    tile_expert,
    tile_row,
    R,
    N,
    K,
    TOP_K,
    DENSE: tl.constexpr,
    X_ROWS: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    ACT: tl.constexpr,
    SCALES: tl.constexpr,
    MATH: tl.constexpr,
    FP8_BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNT_BY: tl.constexpr,
    PTX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP: tl.constexpr,
    PROMOTE: tl.constexpr,
    TAIL_M: tl.constexpr,
    HALVES: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [*, K], w [E, PARTS * N, K] -> out [*, N]. DENSE: E is 1 and all R rows belong to it.

    X_ROWS, OUT_ROWS: which rows of x and of out belong to sorted rows, see `_rows_of`. ACT ""
    applies nothing; with PARTS == 2 and ACT "" out is [*, 2 * N]. HALVES: see `_block_tile`; w is a
    tensor descriptor of [E * PARTS * N, K]. GROUPS: w has words [E, PARTS * N, 4 * groups(K)], and
    w_group bits [E, PARTS * N, groups(K)], a multiple of COUNT_BY.
    """
    COLS: tl.constexpr = BLOCK_N // PARTS
    num_n = tl.cdiv(N, COLS)
    num_m = tl.num_programs(0) // num_n
    pid = tl.program_id(0)
    group = pid // (GROUP_M * num_n)
    inside = pid % (GROUP_M * num_n)
    height = min(num_m - group * GROUP_M, GROUP_M)
    m = group * GROUP_M + inside % height
    n = inside // height

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if DENSE:
        expert = 0
        start = m * BLOCK_M
        stop = R
    else:
        expert = tl.load(tile_expert + m)
        if expert < 0:
            return
        start = tl.load(tile_row + m)
        stop = tl.load(offsets + expert + 1)
    # What is left of an expert's rows after whole tiles is often little: a lower tile wastes less.
    if TAIL_M > 0 and stop - start <= TAIL_M:
        if HALVES:
            _block_tile(
                x, x_scale, w, w_scale, bias, out, pairs, expert, start, stop, n, N, K,
                TOP_K, X_ROWS, OUT_ROWS, PARTS, ACT, HAS_BIAS, EVEN_K, TAIL_M, BLOCK_N, BLOCK_K,
                STAGES,
            )  # fmt: skip
        else:
            _tile(
                x, x_scale, w, w_scale, w_group, bias, out, pairs, expert, start, stop, n, N, K,
                TOP_K, X_ROWS, OUT_ROWS, PARTS, ACT, SCALES, MATH, FP8_BITS, GROUPS, COUNT_BY, PTX,
                HAS_BIAS, EVEN_K, TAIL_M, BLOCK_N, BLOCK_K, SWAP, PROMOTE, STAGES,
            )  # fmt: skip
    elif HALVES:
        _block_tile(
            x, x_scale, w, w_scale, bias, out, pairs, expert, start, stop, n, N, K,
            TOP_K, X_ROWS, OUT_ROWS, PARTS, ACT, HAS_BIAS, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
            STAGES,
        )  # fmt: skip
    else:
        _tile(
            x, x_scale, w, w_scale, w_group, bias, out, pairs, expert, start, stop, n, N, K,
            TOP_K, X_ROWS, OUT_ROWS, PARTS, ACT, SCALES, MATH, FP8_BITS, GROUPS, COUNT_BY, PTX,
            HAS_BIAS, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, PROMOTE, STAGES,
        )  # fmt: skip


@triton.jit
def _tile(
    x,
    x_scale,
    w,
    w_scale,
    w_group,
    bias,
    out,
    pairs,
    expert,
    start,
    stop,
    n,
    N,
    K,
    TOP_K,
    X_ROWS: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    ACT: tl.constexpr,
    SCALES: tl.constexpr,
    MATH: tl.constexpr,
    FP8_BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNT_BY: tl.constexpr,
    PTX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    PROMOTE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows [start, min(start + BLOCK_M, stop)) of an expert times rows of tile n of its weight."""
    COLS: tl.constexpr = BLOCK_N // PARTS
    rows = start + tl.arange(0, BLOCK_M)
    inner = tl.minimum(rows, stop - 1)
    x_row = _rows_of(inner, pairs, TOP_K, X_ROWS)

    j = tl.arange(0, BLOCK_N)
    col = tl.minimum(n * COLS + j // PARTS, N - 1)
    part = j % PARTS
    w_row = part * N + col
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x + x_row.to(tl.int64)[:, None] * K + k[None, :]
    # Of a tile of weights and of their rows, in elements of w
    WIDTH: tl.constexpr = BLOCK_K // WORD if GROUPS != "" else BLOCK_K
    # Only what is aligned is copied asynchronously
    count = tl.multiple_of((K + (GROUP - 1)) // GROUP, COUNT_BY)
    length = count * WORDS if GROUPS != "" else K
    element = tl.arange(0, WIDTH)
    w_ptrs = (
        w
        + (tl.zeros((), tl.int64) + PARTS * N) * length * expert
        + w_row.to(tl.int64)[:, None] * length
        + element[None, :]
    )

    if SCALES == "block":
        tl.static_assert(COLS <= BLOCK)
        grid_n = tl.cdiv(N, BLOCK)
        grid_k = tl.cdiv(K, BLOCK)
        line = w_scale + (expert * (PARTS * grid_n) + n * COLS // BLOCK) * grid_k
        x_line = x_scale + x_row * grid_k
        # Factors are asked for one step ahead: they are too small for the asynchronous copies
        # that bring codes, and waiting for them would stall every step.
        factor = tl.load(line)
        up_factor = tl.load(line + grid_n * grid_k) if PARTS == 2 else factor
        if MATH == "codes":
            x_factor = tl.load(x_line)
        else:
            x_factor = tl.full((BLOCK_M,), 1.0, tl.float32)

    if GROUPS != "":
        g = tl.arange(0, BLOCK_K // GROUP)
        group_ptrs = (
            w_group
            + (tl.zeros((), tl.int64) + PARTS * N) * count * expert
            + w_row.to(tl.int64)[:, None] * count
            + g[None, :]
        )
        # Of low tiles the compiler keeps decoded weights in registers if it sees all loads in the
        # loop; those of high ones go through shared memory, and scales are better asked for early.
        AHEAD: tl.constexpr = BLOCK_M >= 64
        if AHEAD:
            next_group = tl.load(group_ptrs, mask=(g < count)[None, :], other=0.0)

    INTEGER: tl.constexpr = MATH == "codes" and w.dtype.element_ty == tl.int8
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if INTEGER else tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            xk = tl.load(x_ptrs)
            wk = tl.load(w_ptrs)
        else:
            xk = tl.load(x_ptrs, mask=k[None, :] < K - k0, other=0.0)
            rest = length - k0 // (BLOCK_K // WIDTH)
            wk = tl.load(w_ptrs, mask=element[None, :] < rest, other=0.0)
        if GROUPS != "":
            if AHEAD:
                group = next_group
                after = g[None, :] < count - (k0 + BLOCK_K) // GROUP
                next_group = tl.load(group_ptrs + BLOCK_K // GROUP, mask=after, other=0.0)
            elif EVEN_K:
                group = tl.load(group_ptrs)
            else:
                group = tl.load(group_ptrs, mask=g[None, :] < count - k0 // GROUP, other=0.0)
            group_ptrs += BLOCK_K // GROUP
            wk = decode_words(wk, group, x.dtype.element_ty, GROUPS, PTX)
            if SWAP:
                xk, wk = own_groups(xk), own_groups(wk)
        elif MATH == "decode":
            wk = decode_codes(wk, x.dtype.element_ty, FP8_BITS)
        if SWAP:
            left, right = wk, tl.trans(xk)
        else:
            left, right = xk, tl.trans(wk)
        if SCALES == "block":
            after = tl.minimum(k0 // BLOCK + 1, grid_k - 1)
            next_factor = tl.load(line + after)
            next_up_factor = tl.load(line + grid_n * grid_k + after) if PARTS == 2 else next_factor
            next_x_factor = tl.load(x_line + after) if MATH == "codes" else x_factor
            product = tl.dot(left, right)
            if SWAP:
                if PARTS == 2:
                    by_row = tl.where(part == 0, factor, up_factor)
                    acc += product * (by_row[:, None] * x_factor[None, :])
                else:
                    acc += product * (factor * x_factor)[None, :]
            else:
                if PARTS == 2:
                    acc += product * tl.where(
                        (part == 0)[None, :],
                        (factor * x_factor)[:, None],
                        (up_factor * x_factor)[:, None],
                    )
                else:
                    acc += product * (factor * x_factor)[:, None]
            factor, up_factor, x_factor = next_factor, next_up_factor, next_x_factor
        elif INTEGER:
            acc = tl.dot(left, right, acc, out_dtype=tl.int32)
        elif PROMOTE:
            acc += tl.dot(left, right)
        else:
            acc = tl.dot(left, right, acc)
        x_ptrs += BLOCK_K
        w_ptrs += WIDTH

    result = acc.to(tl.float32)
    if SWAP:
        result = tl.trans(result)
    if SCALES != "block":
        if SCALES == "tensor":
            by_col = tl.load(w_scale + expert + 0 * w_row)
        else:
            by_col = tl.load(w_scale + expert * (PARTS * N) + w_row)
        if MATH == "codes":
            result = result * tl.load(x_scale + x_row)[:, None]
        if GROUPS == "mxfp4":
            by_col *= MXFP4_LIFT
        result = result * by_col[None, :]
    if HAS_BIAS:
        result += tl.load(bias + expert * (PARTS * N) + w_row).to(tl.float32)[None, :]

    out_row = _rows_of(inner, pairs, TOP_K, OUT_ROWS)
    # Columns that are not clamped: the compiler has to see that they are contiguous.
    out_col = n * COLS + tl.arange(0, COLS)
    mask = (rows < stop)[:, None] & (out_col < N)[None, :]
    width = N if ACT != "" else PARTS * N
    target = out + out_row.to(tl.int64)[:, None] * width + out_col[None, :]
    if PARTS == 2:
        gate, up = tl.split(tl.reshape(result, (BLOCK_M, COLS, 2)))
        if ACT != "":
            tl.store(target, (activate(gate, ACT) * up).to(out.dtype.element_ty), mask=mask)
        else:
            tl.store(target, gate.to(out.dtype.element_ty), mask=mask)
            tl.store(target + N, up.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(target, activate(result, ACT).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _block_tile(
    x,
    x_scale,
    w,
    w_scale,
    bias,
    out,
    pairs,
    expert,
    start,
    stop,
    n,
    N,
    K,
    TOP_K,
    X_ROWS: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`_tile` for many rows and scales of blocks; w is a tensor descriptor.

    The halves of the weight tile (gate and up, where there is a gate) are multiplied one after the
    other: while one is scaled and added, the other is in the tensor cores, and the product that
    waits for its factor takes half the registers.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    rows = start + tl.arange(0, BLOCK_M)
    inner = tl.minimum(rows, stop - 1)
    x_row = _rows_of(inner, pairs, TOP_K, X_ROWS)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x + x_row.to(tl.int64)[:, None] * K + k[None, :]
    first = n * (BLOCK_N // PARTS)
    line = expert * (PARTS * N) + first
    shift = N if PARTS == 2 else HALF
    grid_n = tl.cdiv(N, BLOCK)
    grid_k = tl.cdiv(K, BLOCK)
    block = first // BLOCK
    other_block = block + grid_n if PARTS == 2 else tl.minimum((first + HALF) // BLOCK, grid_n - 1)
    factors = w_scale + (expert * (PARTS * grid_n) + block) * grid_k
    other_factors = w_scale + (expert * (PARTS * grid_n) + other_block) * grid_k
    x_factors = x_scale + x_row * grid_k
    acc = tl.zeros((BLOCK_M, HALF), tl.float32)
    other_acc = tl.zeros((BLOCK_M, HALF), tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            xk = tl.load(x_ptrs)
        else:
            xk = tl.load(x_ptrs, mask=k[None, :] < K - k0, other=0.0)
        wk = w.load([line, k0])
        other_k = w.load([line + shift, k0])
        factor, other_factor = tl.load(factors + k0 // BLOCK), tl.load(other_factors + k0 // BLOCK)
        x_factor = tl.load(x_factors + k0 // BLOCK)
        acc += tl.dot(xk, tl.trans(wk)) * (factor * x_factor)[:, None]
        other_acc += tl.dot(xk, tl.trans(other_k)) * (other_factor * x_factor)[:, None]
        x_ptrs += BLOCK_K

    col = first + tl.arange(0, HALF)
    if HAS_BIAS:
        bias += expert * (PARTS * N)
        acc += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
        other = tl.load(bias + shift + col, mask=shift + col < PARTS * N, other=0.0)
        other_acc += other.to(tl.float32)[None, :]
    out_row = _rows_of(inner, pairs, TOP_K, OUT_ROWS)
    width = N if ACT != "" else PARTS * N
    target = out + out_row.to(tl.int64)[:, None] * width + col[None, :]
    inside = (rows < stop)[:, None] & (col < N)[None, :]
    if PARTS == 2 and ACT != "":
        h = activate(acc, ACT) * other_acc
        tl.store(target, h.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(target, activate(acc, ACT).to(out.dtype.element_ty), mask=inside)
        if PARTS == 1:
            inside = (rows < stop)[:, None] & (col + HALF < N)[None, :]
        result = activate(other_acc, ACT).to(out.dtype.element_ty)
        tl.store(target + shift, result, mask=inside)
