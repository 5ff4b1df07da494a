"""Weight-only experts for very many rows: decode a part of the weights, multiply with a library.

Past about a thousand rows per expert, writing int8 codes out as bf16 (exact) costs less than the
tensor cores lose to decoding inside the product, and PyTorch's grouped bf16 GEMM
(`torch._grouped_mm`) is the fastest there is. Parts are ranges of rows, so that the memory beside
the result stays within a bound: gate and up rows of a part, their product, and its activation; then
rows of the down projection, whose products are combined at once.

    tile = bf16(w13[:, part]);  h[:, part] = act(x @ tile.T * scale)
    tile = bf16(w2[:, part]);   out[:, part] = sum over slots of topk_weight * (h @ tile.T * scale)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeq.experts import ExpertWeights
from moeq.kernels.triton.decode import MXFP4_LIFT, WORD, WORDS, decode_words
from moeq.kernels.triton.gemm import activate
from moeq.kernels.triton.routing import route
from moeq.kernels.triton.rows import GROUP, GROUPS, combine_rows

_ALIGN = 128
"""Rows of a part are a multiple of it."""


def fused_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    activation: str,
    scratch: int,
) -> Tensor:
    """One MoE layer; codes of eight or four bits with a scale per row, x bf16 [T, H], T * k > 0.

    Args:
        x: [T, H].
        topk_ids: [T, k]; ids outside 0..E-1 add nothing.
        topk_weights: [T, k].
        weights: of the E experts held here.
        activation: a key of `ACTIVATIONS`.
        scratch: bytes of decoded weights held at a time.
    """
    (t, h), k = x.shape, topk_ids.shape[1]
    e, parts, i = weights.num_experts, weights.parts, weights.intermediate_size
    p = t * k
    routing = route(topk_ids, e, _ALIGN)
    ends = routing.offsets[1:]
    rows = x.new_empty(p, h)
    gather_rows[(p,)](
        x, rows, routing.pairs, routing.offsets, e, h,
        TOP_K=k, WIDE=triton.next_power_of_2(h), num_warps=4,
    )  # fmt: skip
    mid = x.new_empty(p, i)
    step = _part(scratch, e, parts * h, i)
    for first in range(0, i, step):
        width = min(step, i - first)
        tile = _decode(weights.w13, weights.w13_group, h, parts, first, width)
        product = torch._grouped_mm(rows, tile.transpose(1, 2), offs=ends)
        activate_rows[(p, triton.cdiv(width, 2048))](
            product, weights.w13_scale, weights.w13_scale if weights.b13 is None else weights.b13,
            mid, routing.pairs, topk_ids, routing.offsets, e, i, first, width,
            PARTS=parts, ACT=activation, HAS_BIAS=weights.b13 is not None,
            WIDE=min(2048, triton.next_power_of_2(width)), num_warps=4,
        )  # fmt: skip
    out = torch.empty_like(x)
    step = _part(scratch, e, i, h)
    for first in range(0, h, step):
        tile = _decode(weights.w2, weights.w2_group, i, 1, first, min(step, h - first))
        product = torch._grouped_mm(mid, tile.transpose(1, 2), offs=ends)
        combine_rows(
            product, topk_ids, topk_weights, out, e,
            positions=routing.positions, scale=weights.w2_scale, bias=weights.b2, column=first,
        )  # fmt: skip
    return out


def _part(scratch: int, num_experts: int, depth: int, rows: int) -> int:
    """Rows decoded at a time: as many as fit, in equal parts."""
    most = max(_ALIGN, scratch // (2 * num_experts * depth))
    part = -(-rows // -(-rows // most))
    return min(rows, -(-part // _ALIGN) * _ALIGN)


def _decode(
    codes: Tensor, group: Tensor | None, k: int, parts: int, first: int, width: int
) -> Tensor:
    """Codes of [E, parts * N, K] -> bf16 [E, parts * width, K]: rows first.. of every projection,
    times their group scales where they have some."""
    e, rows, _ = codes.shape
    out = torch.empty(e, parts * width, k, dtype=torch.bfloat16, device=codes.device)
    wide = min(4096, max(128, triton.next_power_of_2(k)))
    grid = (parts * width, triton.cdiv(k, wide), e)
    if group is None:
        decode_rows[grid](
            codes, out, first, width, rows // parts, k, PARTS=parts, WIDE=wide, num_warps=4
        )
    else:
        decode_group_rows[grid](
            codes.view(torch.int32), group.view(torch.uint8), out, first, width, rows // parts, k,
            PARTS=parts, WIDE=wide, GROUPS=GROUPS[group.dtype], PTX=codes.is_cuda, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def gather_rows(x, out, pairs, offsets, E, K, TOP_K: tl.constexpr, WIDE: tl.constexpr):
    """x [T, K] -> out [P, K]: the row of every sorted pair's token."""
    r = tl.program_id(0).to(tl.int64)
    if r >= tl.load(offsets + E):
        return
    token = (tl.load(pairs + r) // TOP_K).to(tl.int64)
    k = tl.arange(0, WIDE)
    tl.store(out + r * K + k, tl.load(x + token * K + k, mask=k < K), mask=k < K)


@triton.jit
def activate_rows(
    product,
    scale,
    bias,
    out,
    pairs,
    ids,
    offsets,
    E,
    N,
    FIRST,
    WIDTH,
    PARTS: tl.constexpr,
    ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """product [P, PARTS * WIDTH], sorted -> columns [FIRST, FIRST + WIDTH) of out [P, N]: scale,
    bias, activation. Rows past the last local pair are left alone."""
    r = tl.program_id(0).to(tl.int64)
    if r >= tl.load(offsets + E):
        return
    n = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = n < WIDTH
    base = tl.load(ids + tl.load(pairs + r)).to(tl.int64) * (PARTS * N) + FIRST
    row = product + r * (PARTS * WIDTH)
    value = tl.load(row + n, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(scale + base + n, mask=inside, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + base + n, mask=inside, other=0.0).to(tl.float32)
    value = activate(value, ACT)
    if PARTS == 2:
        up = tl.load(row + WIDTH + n, mask=inside, other=0.0).to(tl.float32)
        up *= tl.load(scale + base + N + n, mask=inside, other=0.0)
        if HAS_BIAS:
            up += tl.load(bias + base + N + n, mask=inside, other=0.0).to(tl.float32)
        value *= up
    tl.store(out + r * N + FIRST + n, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def decode_rows(w, out, FIRST, WIDTH, N, K, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """w int8 [E, PARTS * N, K] -> out bf16 [E, PARTS * WIDTH, K], unscaled."""
    k = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    r = tl.program_id(0)
    e = tl.program_id(2).to(tl.int64)
    source = e * (PARTS * N) + (r // WIDTH) * N + FIRST + r % WIDTH
    codes = tl.load(w + source * K + k, mask=k < K, other=0)
    tl.store(out + (e * (PARTS * WIDTH) + r) * K + k, codes.to(tl.bfloat16), mask=k < K)


@triton.jit
def decode_group_rows(
    w, group, out, FIRST, WIDTH, N, K, PARTS: tl.constexpr, WIDE: tl.constexpr,
    GROUPS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """w: words of [E, PARTS * N, K], group: bits -> out bf16 [E, PARTS * WIDTH, K]."""
    r = tl.program_id(0)
    e = tl.program_id(2).to(tl.int64)
    source = e * (PARTS * N) + (r // WIDTH) * N + FIRST + r % WIDTH
    count = tl.cdiv(K, GROUP)
    g = tl.program_id(1) * (WIDE // GROUP) + tl.arange(0, WIDE // GROUP)[None, :]
    word = tl.program_id(1) * (WIDE // WORD) + tl.arange(0, WIDE // WORD)[None, :]
    codes = tl.load(w + source * (count * WORDS) + word, mask=word < count * WORDS, other=0)
    scale = tl.load(group + source * count + g, mask=g < count, other=0)
    k = tl.program_id(1) * WIDE + tl.arange(0, WIDE)[None, :]
    value = decode_words(codes, scale, tl.bfloat16, GROUPS, PTX)
    if GROUPS == "mxfp4":
        value = (value.to(tl.float32) * MXFP4_LIFT).to(tl.bfloat16)
    tl.store(out + (e * (PARTS * WIDTH) + r) * K + k, value, mask=k < K)
