"""What happens between and after the GEMMs, row by row: quantize, activate, combine.

`quantize_rows` is `moeq.quantize.quantize_activations`, bit for bit. `combine` adds the k outputs
of every token in fp32, in the order of its slots: the same bits from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(128)
GROUP = tl.constexpr(32)

GROUPS = {torch.float8_e4m3fn: "int4", torch.float8_e8m0fnu: "mxfp4"}
"""What kernels call codes of four bits, by the dtype of their group scales."""
INT8_MAX = tl.constexpr(127.0)
FP8_MAX = tl.constexpr(448.0)
SCALE_MIN = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def scale_of(amax, CODES: tl.constexpr):
    """fp32 scales from fp32 amaxes; 1 where amax is 0, NaN where it is NaN. CODES: their dtype."""
    qmax = INT8_MAX if CODES == tl.int8 else FP8_MAX
    scale = tl.div_rn(amax, qmax)
    scale = tl.maximum(scale, SCALE_MIN, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(amax == 0.0, 1.0, scale)


@triton.jit
def magnitude(value):
    """|value| of fp32 as int32 bits: ordered as the values are, NaN above all. The hardware's
    maximum of floats drops NaN."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def encode(x, scale, CODES: tl.constexpr):
    """fp32 values to codes: IEEE quotient, round half to even, clamp.

    The quotient is x / scale rounded once, made of the reciprocal of the scale and one correction
    by its remainder (Markstein's theorem: exact for a correctly rounded reciprocal as long as
    nothing underflows, which the power of two sees to). That is a third of the instructions of a
    division, and the reciprocal is shared by a row.
    """
    lift = tl.where(scale < 8.673617379884035e-19, 1.8446744073709552e19, 1.0)  # 2^-60, 2^64
    divisor = scale * lift
    reciprocal = tl.div_rn(divisor * 0.0 + 1.0, divisor)
    x = x * lift
    estimate = x * reciprocal
    quotient = tl.fma(tl.fma(-estimate, divisor, x), reciprocal, estimate)
    if CODES == tl.int8:
        # Adding 1.5 * 2^23 leaves no bits for fractions: the hardware rounds half to even.
        quotient = tl.minimum(tl.maximum(quotient, -INT8_MAX), INT8_MAX)
        return ((quotient + 12582912.0) - 12582912.0).to(tl.int8)
    quotient = tl.where(estimate == 0.0, estimate, quotient)  # the correction loses the sign of -0
    return tl.minimum(tl.maximum(quotient, -FP8_MAX), FP8_MAX).to(CODES)


@triton.jit
def quantize_rows(
    x,
    codes,
    scale,
    R,
    K,
    BLOCKS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDE: tl.constexpr,
    TRIGGER: tl.constexpr,
    WAIT: tl.constexpr,
):
    """x [R, K] -> codes [R, K], scale [R] or, with BLOCKS, [R, ceil(K / 128)]. WIDE >= K; HEIGHT
    rows to a program. TRIGGER: the next kernel may start; WAIT: launched to overlap itself."""
    if TRIGGER:
        tl.extra.cuda.gdc_launch_dependents()
    if WAIT:
        tl.extra.cuda.gdc_wait()
    CODES: tl.constexpr = codes.dtype.element_ty
    r = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    k = tl.arange(0, WIDE)
    at = r.to(tl.int64)[:, None] * K + k[None, :]
    mask = (r < R)[:, None] & (k < K)[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if BLOCKS:
        COUNT: tl.constexpr = WIDE // BLOCK
        value = tl.reshape(value, (HEIGHT * COUNT, BLOCK))
        amax = tl.max(magnitude(value), 1).to(tl.float32, bitcast=True)
        by_block = scale_of(amax, CODES)
        code = tl.reshape(encode(value, by_block[:, None], CODES), (HEIGHT, WIDE))
        b = tl.arange(0, COUNT)
        grid_k = tl.cdiv(K, BLOCK)
        tl.store(
            scale + r[:, None] * grid_k + b[None, :],
            tl.reshape(by_block, (HEIGHT, COUNT)),
            mask=(r < R)[:, None] & (b < grid_k)[None, :],
        )
    else:
        amax = tl.max(magnitude(value), 1).to(tl.float32, bitcast=True)
        by_row = scale_of(amax, CODES)
        tl.store(scale + r, by_row, mask=r < R)
        code = encode(value, by_row[:, None], CODES)
    tl.store(codes + at, code, mask=mask)


def launch_options(pdl: bool) -> dict[str, bool]:
    """Of a kernel that may overlap with its predecessor; the interpreter knows no such thing."""
    return {"launch_pdl": True} if pdl else {}


def combine_rows(
    y: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    out: Tensor,
    num_experts: int,
    *,
    positions: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    column: int = 0,
    pdl: bool = False,
) -> None:
    """Add the weighted outputs of every token's experts.

    Args:
        y: [T * k, C], one row a pair; or sorted rows, where `positions` says which is whose.
        topk_ids: [T, k]; ids outside 0..E-1 add nothing, their rows are never read.
        topk_weights: [T, k].
        out: [T, H], columns [column, column + C) are written.
        num_experts: E.
        positions: int32 [T * k], from routing.
        scale: [E, H] that y has not seen yet.
        bias: [E, H], likewise.
        column: first column.
        pdl: launched to overlap with its predecessor.
    """
    t, k = topk_ids.shape
    wide = min(1024, triton.next_power_of_2(y.shape[1]))
    combine[(t, triton.cdiv(y.shape[1], wide))](
        y,
        topk_ids if positions is None else positions,
        topk_ids,
        topk_weights,
        y if scale is None else scale,
        y if bias is None else bias,
        out,
        num_experts,
        y.shape[1],
        out.shape[1],
        column,
        TOP_K=k,
        SORTED=positions is not None,
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None,
        WIDE=wide,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )


@triton.jit
def combine(
    y,
    positions,
    ids,
    topk_weights,
    scale,
    bias,
    out,
    E,
    N,
    H,
    FIRST,
    TOP_K: tl.constexpr,
    SORTED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """See `combine_rows`."""
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
            value *= tl.load(scale + expert * H + FIRST + n, mask=mask, other=0.0)
        if HAS_BIAS:
            value += tl.load(bias + expert * H + FIRST + n, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(topk_weights + pair).to(tl.float32)
        acc += tl.where(local, value * weight, 0.0)
    tl.store(out + token * H + FIRST + n, acc.to(out.dtype.element_ty), mask=n < N)
